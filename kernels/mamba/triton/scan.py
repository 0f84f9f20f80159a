"""What `mamba_chunk_scan_combined` does before and after its attention, in Triton: each tensor as large as x is read or
written once.

A program takes the tokens of one head, and neighbouring programs neighbouring heads, which lie side by side in memory.
Sums over tokens are taken by SEGMENT tokens from the start of what is here, and then segment by segment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.mamba.pytorch.scan import Gradients, Steps
from leetdist.kernels.mamba.triton.scan_kernels import (
    outputs_kernel,
    products_gradient_kernel,
    steps_gradient_kernel,
    steps_kernel,
)
from leetdist.kernels.runtime.triton_launch import launch
from leetdist.kernels.token_decay.triton.weighted import weighted_values

ELEMENTS = 4096  # of x that a program holds; half as many where it holds sums as well
SEGMENT = 256  # tokens whose sums one program takes
TURNED = 32  # tokens and heads of a program that only looks at dt: beside x, v and o that is little, but (B, N, H)


def scan_inputs(
    x: Tensor, dt: Tensor, A: Tensor, bias: Tensor | None, starts: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor]:
    """See leetdist.kernels.mamba.pytorch.scan.scan_inputs."""
    own, log_decay = scan_steps(dt, A, bias, starts, steps)
    return weighted_values(x.transpose(1, 2), own).transpose(1, 2), log_decay


def scan_inputs_gradient(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    D: Tensor | None,
    starts: Tensor | None,
    dv: Tensor,
    dlog_decay: Tensor,
    dskip: Tensor | None,
    steps: Steps,
    needs: tuple[bool, bool, bool, bool, bool],
    *,
    own: Tensor | None = None,
    spent: bool = False,
) -> Gradients:
    """See leetdist.kernels.mamba.pytorch.scan.scan_inputs_gradient."""
    batch, tokens, heads, width = x.shape
    segments = ceil_div(tokens, SEGMENT)
    block, columns = _block(2 * width)[0], _block(width)[1]
    if D is None:
        dskip = None

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = A.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    if own is None:
        own, _ = scan_steps(dt, A, bias, None, steps)
    # A program reads what it writes, and no other does: dx can lie where dv does.
    into_dv = spent and needs[0] and dv.is_contiguous() and dv.dtype == x.dtype
    dx = dv if into_dv else empty(needs[0], *x.shape, dtype=x.dtype)
    grown = empty(needs[1] or needs[3], *own.shape)
    dD = None if D is None else empty(needs[4], batch * segments, *D.shape)
    _launch(
        products_gradient_kernel, batch * heads * segments,
        (
            x, own, _contiguous(D), dv, dskip, dx, grown, dD,
            *x.stride(), *dv.stride(), *_strides(dskip), tokens, heads, width, segments,
        ),
        {"WIDE": D is not None and D.ndim == 2, "TOKENS": block, "COLUMNS": columns, "SEGMENT_": SEGMENT},
    )  # fmt: skip
    of_steps = scan_steps_gradient(dt, A, bias, starts, grown, dlog_decay, steps, needs[1:4])
    return Gradients(dx, *of_steps, dD)


def scan_steps_gradient(
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    grown: Tensor | None,
    dlog_decay: Tensor,
    steps: Steps,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See leetdist.kernels.mamba.pytorch.scan.scan_steps_gradient."""
    batch, tokens, heads = dt.shape
    blocks = ceil_div(tokens, TURNED)
    ddt = torch.empty_like(dt, memory_format=torch.contiguous_format) if needs[0] else None
    sums = [A.new_empty(batch * blocks, heads) if wanted else None for wanted in needs[1:]]
    if any(needs):
        _launch(
            steps_gradient_kernel, batch * blocks * ceil_div(heads, TURNED),
            (
                dt, A.contiguous(), _contiguous(bias), _contiguous(starts), grown, dlog_decay, ddt, *sums,
                *dt.stride(), *dlog_decay.stride(), *steps[1:], tokens, heads,
            ),
            {"SOFTPLUS": steps.softplus, "TOKENS": TURNED, "HEADS": min(TURNED, triton.next_power_of_2(heads))},
        )  # fmt: skip
    return ddt, sums[0], sums[1]


def scan_steps(
    dt: Tensor, A: Tensor, bias: Tensor | None, starts: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor]:
    """See leetdist.kernels.mamba.pytorch.scan.scan_steps."""
    batch, tokens, heads = dt.shape
    own, log_decay = (torch.empty(batch, heads, tokens, dtype=A.dtype, device=dt.device) for _ in range(2))
    _launch(
        steps_kernel, batch * ceil_div(tokens, TURNED) * ceil_div(heads, TURNED),
        (
            dt, A.contiguous(), _contiguous(bias), _contiguous(starts), own, log_decay,
            *dt.stride(), *steps[1:], tokens, heads,
        ),
        {"SOFTPLUS": steps.softplus, "TOKENS": TURNED, "HEADS": min(TURNED, triton.next_power_of_2(heads))},
    )  # fmt: skip
    return own, log_decay


def scan_outputs(o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor | None, *, spent: bool = False) -> Tensor:
    """See leetdist.kernels.mamba.pytorch.scan.scan_outputs."""
    # A program reads what it writes, and no other does.
    y = o if spent and o.is_contiguous() else torch.empty(o.shape, dtype=o.dtype, device=o.device)
    _launch_outputs(None, o, x, D, z, y, None)
    return y


def scan_outputs_gradient(
    dy: Tensor, o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor]:
    """See leetdist.kernels.mamba.pytorch.scan.scan_outputs_gradient."""
    do, dz = (torch.empty(o.shape, dtype=y.dtype, device=o.device) for y in (o, z))
    _launch_outputs(dy, o, x, D, z, do, dz)
    return do, dz


def compile_for(
    step: str, rows: int, columns: int, dtype: torch.dtype, wide: bool, reverse: bool, programs: int,
    device: torch.device, *, share: int = 1,
) -> None:  # fmt: skip
    """Launch a step's kernel once, on a token of zeros of `columns` columns."""
    x = torch.zeros(1, 1, 1, columns, dtype=dtype, device=device)
    dt, one = x.new_zeros(1, 1, 1, dtype=torch.float32), x.new_zeros(1, dtype=torch.float32)
    steps = Steps(True, 0.0, 1.0)
    if step == "scan_steps":
        scan_steps(dt, one, one, None, steps)
    elif step == "scan_inputs":
        scan_inputs(x, dt, one, one, None, steps)
    elif step == "scan_steps_gradient":
        scan_steps_gradient(dt, one, one, None, dt, dt, steps, (True,) * 3)
    elif step == "scan_inputs_gradient":
        scan_inputs_gradient(x, dt, one, one, one, None, x, dt, x, steps, (True,) * 5)
    elif step == "scan_outputs":
        scan_outputs(x, x, one, x)
    else:
        scan_outputs_gradient(x, x, x, one, x)


def _launch_outputs(
    dy: Tensor | None, o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor | None, y: Tensor, dz: Tensor | None
) -> None:
    """y: what comes out, or with dy the gradient of o."""
    batch, tokens, heads, width = o.shape
    block, columns = _block(width)
    _launch(
        outputs_kernel, batch * heads * ceil_div(tokens, block),
        (
            dy, o, x, _contiguous(D), z, y, dz, *o.stride(), *_strides(dy), *_strides(x), *_strides(z),
            tokens, heads, width,
        ),
        {"WIDE": D is not None and D.ndim == 2, "TOKENS": block, "COLUMNS": columns},
    )  # fmt: skip


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    if programs:
        launch(kernel, (programs,), arguments, constants, num_warps=4)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if x is None else x.stride()


def _block(width: int) -> tuple[int, int]:
    """Tokens and columns of a program."""
    columns = triton.next_power_of_2(width)
    return max(1, min(SEGMENT, ELEMENTS // columns)), columns
