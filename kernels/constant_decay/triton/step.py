"""One token of decoding in Triton: the state is read once and written once, and nothing else is of any size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.constant_decay.triton.configs import padded
from leetdist.kernels.runtime.triton_launch import launch

# State columns a program holds, for all rows. On an H200 (state 128 x 128, 32 heads, under a CUDA graph, in place), us
# at batch 1, 32 and 256: 32 columns 2.6, 39.5, 309; 64 columns 3.1, 38.0, 271; 128 columns 4.1, 39.3, 270. More warps
# are slower.
COLUMNS = 64
WARPS = 4
ELEMENTS = 16384  # of the state that its threads have registers for: of more than 256 rows, fewer columns
# The compiler fuses products and sums in one kernel and not in the other, and then one token gives other bits than
# several at once; so it may not, and what is to be fused is written as tl.fma.
FUSION = False


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, *, scale: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`new = gamma state + k v^T`, `o = scale * q^T new`.

    q, k: (B, H or fewer, 1, Dk); v: (B, H or fewer, 1, Dv); state: (B, H, Dk, Dv) fp32; log_decay: (H,), any stride,
    (B, H, 1), or None; fp32 or fp64.
    The new state goes to `out`, which may be `state` itself, or to a fresh tensor. Returns (B, H, 1, Dv) and the state.
    """
    batch, heads, rows, columns = state.shape
    if state.stride(-1) != 1:
        state = state.contiguous()
    new = torch.empty(state.shape, dtype=state.dtype, device=state.device) if out is None else out
    o = torch.empty(batch, heads, 1, columns, dtype=q.dtype, device=q.device)
    block = held_columns(rows, columns)
    decays, stride, by_token = canonical_decays(log_decay)
    launch(
        _step,
        (batch * heads, ceil_div(columns, block)),
        (
            q, k, v, state, decays, o, new,
            q.stride(0), q.stride(1), q.stride(3), k.stride(0), k.stride(1), k.stride(3),
            v.stride(0), v.stride(1), v.stride(3), *state.stride()[:3], *new.stride(),
            stride,
            heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1], rows, columns, scale,
        ),
        {"ROWS": padded(rows), "COLUMNS": block, "BY_TOKEN": by_token},
        num_warps=WARPS,
        enable_fp_fusion=FUSION,
    )  # fmt: skip
    return o, new


def held_columns(rows: int, columns: int) -> int:
    """Columns of a state of rows x columns that a program holds."""
    return min(COLUMNS, padded(columns), max(16, ELEMENTS // padded(rows)))


def canonical_decays(log_decay: Tensor | None) -> tuple[Tensor | None, int, bool]:
    """As the kernels take them: decays, their stride, and whether there is one a token, (B, H, T), then contiguous."""
    if log_decay is None:
        return None, 0, False
    if log_decay.ndim == 1:
        return log_decay, log_decay.stride(0), False
    return log_decay.contiguous(), 0, True


@triton.jit
def decay(log_decay, BY_TOKEN: tl.constexpr):
    """gamma as a sum: what of a state stays, 1 or 0, and the factor of what is added to it: see
    leetdist.kernels.constant_decay.pytorch.decode._decay. One a token is data, and where positive makes NaN."""
    exact = tl.load(log_decay).to(tl.float64)
    if BY_TOKEN:
        exact = tl.where(exact <= 0, exact, float("nan"))
    gamma, slow = tl.exp(exact), exact > -0.7
    return tl.where(slow, 1.0, 0.0), tl.where(slow, gamma - 1.0, gamma).to(tl.float32)


@triton.jit
def added(held, k, v):
    """held + k v^T, rounded once."""
    return tl.fma(tl.broadcast_to(k[:, None], held.shape), tl.broadcast_to(v[None, :], held.shape), held)


@triton.jit
def moved(held, k, v, stays, factor):
    """gamma held + k v^T; the small terms first, so that the sum is rounded once."""
    return tl.fma(held, tl.zeros_like(held) + stays, added(held * factor, k, v))


@triton.jit
def _step(
    q, k, v, state, log_decay, o, new,
    q_batch, q_head, q_dim, k_batch, k_head, k_dim, v_batch, v_head, v_dim,
    state_batch, state_head, state_row, new_batch, new_head, new_row, new_column, decay_head,
    heads, q_share, k_share, v_share, rows, columns, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, batch = program % heads, program // heads
    i, j = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    state += batch * state_batch + head * state_head
    held = tl.load(state + i[:, None] * state_row + j[None, :], mask=inside, other=0.0)
    q += batch * q_batch + head // q_share * q_head
    k += batch * k_batch + head // k_share * k_head
    v += batch * v_batch + head // v_share * v_head
    q_i = tl.load(q + i * q_dim, mask=i < rows, other=0.0).to(tl.float32)
    k_i = tl.load(k + i * k_dim, mask=i < rows, other=0.0).to(tl.float32)
    v_j = tl.load(v + j * v_dim, mask=j < columns, other=0.0).to(tl.float32)
    if log_decay is not None:
        held = moved(held, k_i, v_j, *decay(log_decay + (program if BY_TOKEN else head * decay_head), BY_TOKEN))
    else:
        held = added(held, k_i, v_j)
    new += batch * new_batch + head * new_head
    tl.store(new + i[:, None] * new_row + j[None, :] * new_column, held, mask=inside)
    total = tl.sum(q_i[:, None] * held, 0) * scale
    tl.store(o + program * columns + j, total.to(o.dtype.element_ty), mask=j < columns)
