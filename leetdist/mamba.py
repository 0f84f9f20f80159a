"""Mamba-2's operator by the name, and with the arguments, of mamba_ssm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.api import linear_attention, linear_attention_step
from leetdist.arguments import as_bool, as_float, as_int, check_plain, for_autograd
from leetdist.engine import ops
from leetdist.engine.call import run
from leetdist.kernels.mamba.pytorch import scan
from leetdist.operators.layer_steps import kernel
from leetdist.sequence.agreement import told
from leetdist.sequence.documents import check_offsets, check_told_once
from leetdist.sequence.group import resolve
from leetdist.sequence.halo import halo
from leetdist.sequence.once import differentiated_once

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    group: Group | None = None,
    tile: int | None = None,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's selective state space (SSD), over a sequence on one device or sharded across ranks.

    For each batch entry and head, with `dt` after its bias, softplus and limits:

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = (S_t C_t + D x_t) silu(z_t)

    It is `linear_attention` with a decay a token: q = C, k = B, v = dt x (rounded to x's dtype, but written to memory
    only where no kernel of the pass makes the product for itself, and then for that pass), log_decay = dt A. So
    the result on P ranks is, bit for bit, the shards of the result on one device: y, the final states, and the
    gradients of x, dt, B, C, z and initial_states. Those of A, D and dt_bias are each rank's share, which add up to
    the whole. Differentiable once.

    Args:
        x: (B, N, H, P), this rank's shard under a group, as are dt, B, C, z and seq_idx; fp32, bf16, fp16 or fp64.
        dt: (B, N, H), any floating dtype; fp32 (fp64 beside fp64) from here on.
        A: (H,), negative (or 0: no decay).
        B, C: (B, N, G, S) in x's dtype; G divides H, and consecutive heads share a group.
        chunk_size: mamba_ssm's setting of its kernels, which changes nothing here. `tile` is the one that counts.
        D: (H,) or (H, P), or None.
        z: (B, N, H, P), or None: no gate.
        dt_bias: (H,), added to dt.
        initial_states: (B, H, P, S), or (documents, H, P, S) with cu_seqlens; on the first rank only; None is zeros.
        seq_idx: (B, N) int32 or int64, the document of each token. The state restarts where it changes, and, as in
            mamba_ssm, initial_states are those of document 0. What a document gives does not depend on the others,
            but its bits do on where it begins; and one with a NaN is better told by cu_seqlens.
        cu_seqlens: (documents + 1,) int32 or int64, offsets in the whole sequence of documents packed in one row
            (B = 1), each with the bits that it has alone. (mamba_ssm takes them for return_varlen_states, and seq_idx
            for the rest; here final states are those of the documents.)
        dt_softplus: whether dt goes through softplus, after its bias.
        dt_limit: (least, most), what dt is clamped to in the end.
        return_final_states: return the states after the last token too; under a group, on every rank.
        group, tile, precision: as for `linear_attention`.

    Returns:
        y, (B, N, H, P) in x's dtype; or (y, states) with `return_final_states`, states fp32, shaped as initial_states.

    Raises:
        ValueError: an argument is wrong, or the ranks disagree; every rank of the group raises.
        RuntimeError: a rank does not answer.

    Source: Mamba-2, arXiv 2405.21060, sections 5 and 6; the call is mamba_ssm 2.3's.

    >>> import torch, leetdist
    >>> x, dt, A = torch.randn(1, 100, 4, 16), torch.rand(1, 100, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 1, 100, 2, 32)
    >>> def rank(group):
    ...     mine = [leetdist.shard_sequence(y, 1, group) for y in (x, dt, B, C)]
    ...     return leetdist.mamba_chunk_scan_combined(mine[0], mine[1], A, *mine[2:], group=group)
    >>> y = leetdist.mamba_chunk_scan_combined(x, dt, A, B, C)
    >>> torch.equal(torch.cat(leetdist.virtual_ranks(rank, ranks=3), 1), y)
    True
    """
    transport = resolve(group)
    with told(transport, "the arguments of mamba_chunk_scan_combined"):
        _check(
            x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
            dt_softplus, dt_limit, return_final_states,
            alone=transport is None,
        )  # fmt: skip
    starts = None
    if seq_idx is not None:
        # Zeros before the sequence: so initial_states are of document 0.
        before = halo(seq_idx, 1, group, width=1)
        starts = seq_idx != torch.cat((before, seq_idx[:, :-1]), 1)[:, : seq_idx.shape[1]]
    initial = None if initial_states is None else initial_states.to(torch.promote_types(x.dtype, torch.float32)).mT

    options: dict[str, Any] = {
        "initial_state": initial, "return_state": return_final_states, "cu_seqlens": cu_seqlens, "tile": tile,
        "precision": precision,
    }  # fmt: skip

    def attend(v: Tensor, log_decay: Tensor, weight: Tensor | None, skip: Tensor | None) -> Any:
        given = C.transpose(1, 2), B.transpose(1, 2), v, log_decay
        if weight is None:
            return linear_attention(*given, **options, group=group)
        more = {"scale": 1.0, "method": "auto", **options}
        return run(given, more, transport, weight=weight, skip=skip, gated=z is not None)

    steps = scan.Steps(as_bool("dt_softplus", dt_softplus), *map(float, dt_limit))
    y, states = _around(attend, x, dt, A, D, z, dt_bias, starts, steps, weighted=not ops.wanted(x))
    return y if states is None else (y, states.mT)


def decode(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `mamba_chunk_scan_combined` with softplus, by `linear_attention_step`: y, and the states after it,
    (B, H, P, S), which lie in memory as (B, H, S, P) and need no copy if the next step gets them as they are. inplace:
    they are written over `states`."""

    def attend(v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention_step(
            C.transpose(1, 2), B.transpose(1, 2), v, states.mT, log_decay, inplace=inplace
        )  # fmt: skip

    y, new = around(attend, x, dt, A, D=D, dt_bias=dt_bias, dt_limit=dt_limit)
    return y, states if inplace else new.mT


def around(
    attend: Callable[[Tensor, Tensor], tuple[Tensor, Any]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Any]:
    """`mamba_chunk_scan_combined` with softplus around another attention: y, and what `attend(v, log_decay)` returns
    beside outputs, of dt x, (B, H, N, P), and dt A, (B, H, N)."""
    steps = scan.Steps(True, *map(float, dt_limit))
    return _around(
        lambda v, log_decay, *_: attend(v, log_decay), x, dt, A, D, None, dt_bias, None, steps, weighted=False
    )


def _around(
    attend: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor | None,
    steps: scan.Steps,
    *,
    weighted: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and states where there are some, of `attend(v, log_decay, weight, skip)`. weighted: v = dt x is not written, x
    and its weight dt are what there is of it, and skip is D, which it adds x times if no z follows; else both None."""
    x, dt, A = (for_autograd(y) for y in (x, dt, A))
    D, z, dt_bias = (None if y is None else for_autograd(y) for y in (D, z, dt_bias))
    wide = torch.promote_types(x.dtype, torch.float32)
    A = A.to(wide)
    bias, D = (None if y is None else y.to(wide) for y in (dt_bias, D))
    v, log_decay, weight, skipped = _Inputs.apply(x, dt, A, bias, D, starts, steps, weighted)
    attended = attend(v.transpose(1, 2), log_decay, weight, D if weighted else None)
    D, added = None if D is None else D.detach(), weighted and z is None
    o, states = attended if isinstance(attended, tuple) else (attended, None)
    y = o.transpose(1, 2)
    if D is not None or z is not None:
        given = y, skipped, None if added else D, z
        learns = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in given)
        if learns or not weighted:
            y = _Outputs.apply(*given)
        elif not added:  # nobody else has o
            y = kernel(scan.scan_outputs, y, y.shape[3])(*given, spent=True)
    return y, states


class _Inputs(torch.autograd.Function):
    """dt x, (B, N, H, P); dt A, (B, H, N); dt, (B, H, N), if weighted; and D x, if there is a D.

    Products of x are not written: x stands for them, for D x, and if weighted for dt x. Its gradients there are those
    of the products, and all that x gets comes together in one pass over it; or where dt itself has a gradient, that of
    v is already all that x gets, and D has its own from there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        bias: Tensor | None,
        D: Tensor | None,
        starts: Tensor | None,
        steps: scan.Steps,
        weighted: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        weight = None
        if weighted:
            weight, log_decay = kernel(scan.scan_steps, x, x.shape[3])(dt, A, bias, starts, steps)
            v = x
        else:
            v, log_decay = kernel(scan.scan_inputs, x, x.shape[3])(x, dt, A, bias, starts, steps)
        ctx.save_for_backward(x, dt, A, bias, D, starts, weight)
        return v, log_decay, weight, None if D is None else x

    @staticmethod
    @differentiated_once("mamba_chunk_scan_combined")
    def backward(
        ctx: Any, dv: Tensor | None, dlog_decay: Tensor | None, dweight: Tensor | None, dskipped: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, dt, A, bias, D, starts, weight = ctx.saved_tensors
        batch, tokens, heads, _ = x.shape
        if dlog_decay is None:
            dlog_decay = A.new_zeros(batch, heads, tokens)
        needs = ctx.needs_input_grad[:5]
        if dweight is not None:
            of_steps = kernel(scan.scan_steps_gradient, x, x.shape[3])
            return dv, *of_steps(dt, A, bias, starts, dweight, dlog_decay, ctx.steps, needs[1:4]), *[None] * 4
        if dv is None:
            dv = torch.zeros_like(x)
        if D is not None and dskipped is None:
            dskipped = torch.zeros_like(x)
        given = x, dt, A, bias, D, starts, dv, dlog_decay, dskipped, ctx.steps, needs
        function = kernel(scan.scan_inputs_gradient, x, x.shape[3])
        return (*function(*given, own=weight, spent=weight is not None), *[None] * 3)


class _Outputs(torch.autograd.Function):
    """(o + D x) silu(z), rounded once. skipped: x, which stands for D x; without D and z it is in o."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, skipped: Tensor | None, D: Tensor | None, z: Tensor | None) -> Tensor:
        ctx.gated = z is not None
        if z is not None:
            ctx.save_for_backward(o, skipped, D, z)
        if D is None and z is None:
            return o.detach()  # of which nobody keeps anything: no view, so that it can be written over
        y: Tensor = kernel(scan.scan_outputs, o, o.shape[3])(o, skipped, D, z)
        return y

    @staticmethod
    @differentiated_once("mamba_chunk_scan_combined")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dz = None
        if ctx.gated:
            o, skipped, D, z = ctx.saved_tensors
            dy, dz = kernel(scan.scan_outputs_gradient, o, o.shape[3])(dy, o, skipped, D, z)
        return dy, dy if ctx.needs_input_grad[1] else None, None, dz


def check_limits(dt_limit: Any) -> None:
    """What dt is clamped to."""
    wanted = "dt_limit must be (least, most) with 0 <= least <= most"
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise ValueError(f"{wanted}, got {dt_limit!r}")
    if not 0 <= as_float("dt_limit", dt_limit[0]) <= as_float("dt_limit", dt_limit[1]):
        raise ValueError(f"{wanted}, got {dt_limit!r}")


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: Any,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: Any,
    dt_limit: Any,
    return_final_states: Any,
    *,
    alone: bool,
) -> None:
    """What `linear_attention` does not look at, or would name by its own arguments."""
    check_plain("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must have shape (B, N, H, P), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    rows, tokens, heads, width = x.shape
    if not rows or not heads or not width:
        raise ValueError(f"x must have no empty dimension but N, got {tuple(x.shape)}")
    if alone and not tokens:
        raise ValueError("x: N is 0; a sequence needs at least one token")
    check_plain("B", B)
    if B.ndim != 4 or B.shape[:2] != x.shape[:2] or not B.shape[2] or heads % B.shape[2] or not B.shape[3]:
        raise ValueError(
            f"B must have shape (B, N, G, S) = ({rows}, {tokens}, a divisor of {heads}, at least 1), got "
            f"{tuple(B.shape)}"
        )
    groups, size = B.shape[2:]
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "dt": (dt, (rows, tokens, heads)),
        "A": (A, (heads,)),
        "C": (C, (rows, tokens, groups, size)),
        "z": (z, (rows, tokens, heads, width)),
        "dt_bias": (dt_bias, (heads,)),
        "D": (D, (heads, width) if isinstance(D, Tensor) and D.ndim == 2 else (heads,)),
        "seq_idx": (seq_idx, (rows, tokens)),
    }
    optional = ("z", "dt_bias", "D", "seq_idx")
    for name, (y, shape) in shapes.items():
        if y is None and name in optional:
            continue
        check_plain(name, y, "a tensor or None" if name in optional else "a tensor")
        if tuple(y.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} beside x of shape {tuple(x.shape)}, got {tuple(y.shape)}")
    for name, y in (("B", B), ("C", C), ("z", z)):
        if y is not None and y.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype, {x.dtype}, got {y.dtype}")
    if initial_states is not None:
        check_plain("initial_states", initial_states, "a tensor or None")
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, x)
    for name, y in (("dt", dt), ("A", A), ("dt_bias", dt_bias), ("D", D), ("initial_states", initial_states)):
        if y is not None and not y.is_floating_point():
            raise ValueError(f"{name} must be floating, got {y.dtype}")
    beside = {"B": B, "initial_states": initial_states} | {name: y for name, (y, _) in shapes.items()}
    for name, y in beside.items():
        if y is not None and y.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {y.device}")
    if _readable(A) and not bool((A <= 0).all() & A.isfinite().all()):
        raise ValueError(f"A must be finite and <= 0, as -exp(A_log) is, got {A.tolist()}")
    for name, y in (("dt", dt), ("dt_bias", dt_bias)):
        if y is not None and _readable(y) and bool(y.isnan().any()):
            raise ValueError(f"{name} must be numbers, got NaN")
    _check_states_and_documents(x, size, initial_states, seq_idx, cu_seqlens)
    if chunk_size is not None and as_int("chunk_size", chunk_size) < 1:
        raise ValueError(f"chunk_size must be a positive number of tokens, or None, got {chunk_size}")
    as_bool("dt_softplus", dt_softplus)
    as_bool("return_final_states", return_final_states)
    check_limits(dt_limit)


def _readable(x: Tensor) -> bool:
    """Whether looking at the values of x costs little: not on a GPU, and not where it is traced or a fake."""
    return x.is_cpu and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _check_states_and_documents(
    x: Tensor, size: int, initial_states: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    check_told_once(seq_idx, cu_seqlens)
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seq_idx must be int32 or int64, got {seq_idx.dtype}")
    if initial_states is not None:
        rows = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        wanted = (rows, *x.shape[2:], size)
        if tuple(initial_states.shape) != wanted:
            raise ValueError(
                f"initial_states must have shape (B or documents, H, P, S) = {wanted}, got "
                f"{tuple(initial_states.shape)}"
            )


__all__ = ["mamba_chunk_scan_combined"]
