"""What `mamba_chunk_scan_combined` does before and after its attention, in Triton: each tensor as large as x is read or
written once.

A program takes the tokens of one head, and neighbouring programs neighbouring heads, which lie side by side in memory.
Sums over tokens are taken by SEGMENT tokens from the start of what is here, and then segment by segment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.mamba.pytorch.scan import Gradients, Steps
from leetdist.kernels.runtime.triton_launch import launch
from leetdist.kernels.token_decay.triton.weighted import weighted_values

ELEMENTS = 4096  # of x that a program holds; half as many where it holds sums as well
SEGMENT = 256  # tokens whose sums one program takes
TURNED = 32  # tokens and heads of a program that only looks at dt: beside x, v and o that is little, but (B, N, H)
COUNTS = ["tokens"]


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
        _products_gradient, batch * heads * segments,
        (
            x, own, _contiguous(D), dv, dskip, dx, grown, dD,
            *x.stride(), *dv.stride(), *_strides(dskip), tokens, heads, width, segments,
        ),
        {"WIDE": D is not None and D.ndim == 2, "TOKENS": block, "COLUMNS": columns, "SEGMENT_": SEGMENT},
    )  # fmt: skip
    of_steps = scan_steps_gradient(dt, A, bias, starts, grown, dlog_decay, steps, needs[1:4])
    return Gradients(dx, *of_steps, None if dD is None else dD.sum(0))


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
            _steps_gradient, batch * blocks * ceil_div(heads, TURNED),
            (
                dt, A.contiguous(), _contiguous(bias), _contiguous(starts), grown, dlog_decay, ddt, *sums,
                *dt.stride(), *dlog_decay.stride(), *steps[1:], tokens, heads,
            ),
            {"SOFTPLUS": steps.softplus, "TOKENS": TURNED, "HEADS": min(TURNED, triton.next_power_of_2(heads))},
        )  # fmt: skip
    dA, dbias = (None if parts is None else parts.sum(0) for parts in sums)
    return ddt, dA, dbias


def scan_steps(
    dt: Tensor, A: Tensor, bias: Tensor | None, starts: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor]:
    """See leetdist.kernels.mamba.pytorch.scan.scan_steps."""
    batch, tokens, heads = dt.shape
    own, log_decay = (torch.empty(batch, heads, tokens, dtype=A.dtype, device=dt.device) for _ in range(2))
    _launch(
        _steps_of, batch * ceil_div(tokens, TURNED) * ceil_div(heads, TURNED),
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
        _scan_outputs, batch * heads * ceil_div(tokens, block),
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


@triton.jit
def _place(tokens, heads, TOKENS: tl.constexpr):
    """Batch entry, head and first token of a program."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, TOKENS)
    return program // heads // blocks, program % heads, program // heads % blocks * TOKENS


@triton.jit
def _exp_of_negative(x):
    """exp(x) of fp32 x <= 0 to the last bits, where tl.exp is off by 1e-6 of large ones. Below e^-87 it stays there.

    x = n log(2) + rest, where n times the first of the two parts of log(2) is exact, as in Cody and Waite's Software
    Manual for the Elementary Functions (1980), chapter 6."""
    x = tl.where(x < -87.0, -87.0, x)  # where, so that NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp(rest) * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _softplus(x):
    """log(1 + e^x) and its derivative, of fp32."""
    u = _exp_of_negative(-tl.abs(x))
    rounded = 1.0 + u
    lost = rounded == 1.0
    log1p = tl.where(lost, u, tl.log(rounded) * (u / tl.where(lost, 1.0, rounded - 1.0)))
    return tl.where(x > 0.0, x, 0.0 * x) + log1p, tl.where(x > 0.0, 1.0, u) / rounded


@triton.jit
def _steps(dt, bias, least, most, SOFTPLUS: tl.constexpr):
    """Of dt as it is given: after bias, softplus and limits, and the derivative by it."""
    soft = dt.to(tl.float32) + bias
    slope = tl.zeros_like(soft) + 1.0
    if SOFTPLUS:
        soft, slope = _softplus(soft)
    own = tl.where(soft < least, least, soft)  # where, so that NaN stays
    slope = tl.where((soft >= least) & (soft <= most), slope, 0.0)
    return tl.where(own > most, most, own), slope


@triton.jit
def _silu(x):
    """x sigmoid(x), and sigmoid(x)."""
    s = 1.0 / (1.0 + tl.exp(-x))
    return x * s, s


@triton.jit
def _turn(tokens, heads, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Batch entry, block of tokens, tokens and heads of a program that looks at dt."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, TOKENS)
    parts = tl.cdiv(heads, HEADS)
    block = program // parts % blocks
    i = block * TOKENS + tl.arange(0, TOKENS)[:, None]
    return program // parts // blocks, block, i, program % parts * HEADS + tl.arange(0, HEADS)[None, :]


@triton.jit
def _given_steps(dt, bias, place, h, heads, inside, least, most, SOFTPLUS: tl.constexpr):
    """See _steps; of what is loaded."""
    added = 0.0
    if bias is not None:
        added = tl.load(bias + h, mask=h < heads, other=0.0)
    return _steps(tl.load(dt + place, mask=inside, other=0.0), added, least, most, SOFTPLUS)


@triton.jit(do_not_specialize=COUNTS)
def _steps_of(
    dt, a, bias, starts, own, log_decay, dt_batch, dt_token, dt_head, least, most, tokens, heads,
    SOFTPLUS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    batch, _block, i, h = _turn(tokens, heads, TOKENS, HEADS)
    inside = (i < tokens) & (h < heads)
    place = batch * dt_batch + i * dt_token + h * dt_head
    steps, _slope = _given_steps(dt, bias, place, h, heads, inside, least, most, SOFTPLUS)
    g = steps * tl.load(a + h, mask=h < heads, other=0.0)
    if starts is not None:
        g = tl.where(tl.load(starts + batch * tokens + i, mask=i < tokens, other=0) != 0, float("-inf"), g)
    place = (batch * heads + h) * tokens + i
    tl.store(own + place, steps, mask=inside)
    tl.store(log_decay + place, g, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _steps_gradient(
    dt, a, bias, starts, grown, dlog_decay, ddt, da, dbias,
    dt_batch, dt_token, dt_head, g_batch, g_head, g_token, least, most, tokens, heads,
    SOFTPLUS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """grown: what dt gets by dt x, (B, H, N)."""
    batch, block, i, h = _turn(tokens, heads, TOKENS, HEADS)
    inside = (i < tokens) & (h < heads)
    place = batch * dt_batch + i * dt_token + h * dt_head
    steps, slope = _given_steps(dt, bias, place, h, heads, inside, least, most, SOFTPLUS)
    g = tl.load(dlog_decay + batch * g_batch + h * g_head + i * g_token, mask=inside, other=0.0)
    if starts is not None:
        g = tl.where(tl.load(starts + batch * tokens + i, mask=i < tokens, other=0) != 0, 0.0, g)
    part = (batch * tl.cdiv(tokens, TOKENS) + block) * heads + h
    if da is not None:
        tl.store(da + part, tl.sum(tl.where(inside, g * steps, 0.0), 0)[None, :], mask=h < heads)
    if grown is not None:
        total = tl.load(grown + (batch * heads + h) * tokens + i, mask=inside, other=0.0)
        total = (total + g * tl.load(a + h, mask=h < heads, other=0.0)) * slope
        if ddt is not None:
            tl.store(ddt + (batch * tokens + i) * heads + h, total.to(ddt.dtype.element_ty), mask=inside)
        if dbias is not None:
            tl.store(dbias + part, tl.sum(tl.where(inside, total, 0.0), 0)[None, :], mask=h < heads)


@triton.jit(do_not_specialize=COUNTS)
def _products_gradient(
    x, own, skip, dv, dskip, dx, grown, dd,
    x_batch, x_token, x_head, x_column, dv_batch, dv_token, dv_head, dv_column,
    dskip_batch, dskip_token, dskip_head, dskip_column, tokens, heads, width, segments,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT_: tl.constexpr,
):  # fmt: skip
    batch, head, first = _place(tokens, heads, SEGMENT_)
    segment = first // SEGMENT_
    j = tl.arange(0, COLUMNS)
    x += batch * x_batch + head * x_head + j[None, :] * x_column
    dv += batch * dv_batch + head * dv_head + j[None, :] * dv_column
    row = (batch * heads + head) * tokens
    if dskip is not None:
        dskip += batch * dskip_batch + head * dskip_head + j[None, :] * dskip_column
        if WIDE:
            factor = tl.load(skip + head * width + j, mask=j < width, other=0.0)[None, :]
        else:
            factor = tl.load(skip + head)
    sum_d = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for offset in range(0, SEGMENT_, TOKENS):
        i = first + offset + tl.arange(0, TOKENS)
        there = i < tokens
        inside = there[:, None] & (j < width)[None, :]
        values = tl.load(x + i[:, None] * x_token, mask=inside, other=0.0).to(tl.float32)
        of_v = tl.load(dv + i[:, None] * dv_token, mask=inside, other=0.0).to(tl.float32)
        if grown is not None:
            tl.store(grown + row + i, tl.sum(of_v * values, 1), mask=there)
        of_x = of_v * tl.load(own + row + i, mask=there, other=0.0)[:, None]
        if dskip is not None:
            of_skip = tl.load(dskip + i[:, None] * dskip_token, mask=inside, other=0.0).to(tl.float32)
            of_x += of_skip * factor
            if dd is not None:
                sum_d += of_skip * values
        if dx is not None:
            place = dx + ((batch * tokens + i[:, None]) * heads + head) * width + j[None, :]
            tl.store(place, of_x.to(dx.dtype.element_ty), mask=inside)
    if dd is not None:
        part, of_columns = (batch * segments + segment) * heads + head, tl.sum(sum_d, 0)
        if WIDE:
            tl.store(dd + part * width + j, of_columns, mask=j < width)
        else:
            tl.store(dd + part, tl.sum(of_columns, 0))


@triton.jit(do_not_specialize=COUNTS)
def _scan_outputs(
    dy, o, x, skip, z, y, dz,
    o_batch, o_token, o_head, o_column, dy_batch, dy_token, dy_head, dy_column,
    x_batch, x_token, x_head, x_column, z_batch, z_token, z_head, z_column, tokens, heads, width,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, head, first = _place(tokens, heads, TOKENS)
    i, j = (first + tl.arange(0, TOKENS))[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (i < tokens) & (j < width)
    place = batch * o_batch + i * o_token + head * o_head + j * o_column
    total = tl.load(o + place, mask=inside, other=0.0).to(tl.float32)
    if x is not None:
        place = batch * x_batch + i * x_token + head * x_head + j * x_column
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if WIDE:
            total += values * tl.load(skip + head * width + j, mask=j < width, other=0.0)
        else:
            total += values * tl.load(skip + head)
    out = ((batch * tokens + i) * heads + head) * width + j
    if z is not None:
        place = batch * z_batch + i * z_token + head * z_head + j * z_column
        gate = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
        opened, s = _silu(gate)
        if dy is not None:
            place = batch * dy_batch + i * dy_token + head * dy_head + j * dy_column
            grown = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
            of_gate = grown * total * (s * (1.0 + gate * (1.0 - s)))
            tl.store(dz + out, of_gate.to(dz.dtype.element_ty), mask=inside)
            total = grown * opened
        else:
            total *= opened
    tl.store(y + out, total.to(y.dtype.element_ty), mask=inside)
