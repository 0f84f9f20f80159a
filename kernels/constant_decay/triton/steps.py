"""A few tokens of decoding for many requests in Triton: each state is read once, and written once where it changes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.constant_decay.triton.configs import padded
from leetdist.kernels.constant_decay.triton.step import (
    FUSION,
    WARPS,
    added,
    canonical_decays,
    decay,
    held_columns,
    moved,
)
from leetdist.kernels.runtime.triton_launch import launch


def steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
    ages: Tensor | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.decode.steps. A state that keeps no token is not written. log_decay:
    (H,), (B, H, T), or None."""
    batch, _, tokens, rows = q.shape
    heads, columns = states.shape[1], v.shape[3]
    o = torch.empty(batch, heads, tokens, columns, dtype=q.dtype, device=q.device)
    block = held_columns(rows, columns)
    decays, stride, by_token = canonical_decays(log_decay)
    launch(
        _steps,
        (batch * heads, ceil_div(columns, block)),
        (
            q, k, v, states, decays, o, index, lengths, ages,
            *q.stride(), *k.stride(), *v.stride(), *states.stride(), stride, _stride(index), _stride(lengths),
            heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1], states.shape[0],
            tokens, rows, columns, scale,
        ),
        {"ROWS": padded(rows), "COLUMNS": block, "BY_TOKEN": by_token},
        num_warps=WARPS,
        enable_fp_fusion=FUSION,
    )  # fmt: skip
    return o


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


@triton.jit
def _steps(
    q, k, v, states, log_decay, o, index, lengths, ages,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    state_slot, state_head, state_row, state_column, decay_head, index_row, length_row,
    heads, q_share, k_share, v_share, slots, tokens, rows, columns, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, batch = program % heads, program // heads
    slot, kept, good = batch, tokens + 0 * batch, batch >= 0  # int64, int64, bool
    if index is not None:
        slot = tl.load(index + batch * index_row).to(tl.int64)
        good = (slot >= 0) & (slot < slots)
    if lengths is not None:
        kept = tl.load(lengths + batch * length_row).to(tl.int64)
        good = good & (kept >= 0) & (kept <= tokens)
    slot, kept = tl.where(good, slot, 0), tl.where(good, kept, 0)
    i, j = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    states += slot * state_slot + head * state_head
    pointers = states + i[:, None] * state_row + j[None, :] * state_column
    held = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if log_decay is not None and not BY_TOKEN:
        stays, factor = decay(log_decay + head * decay_head, False)
    q += batch * q_batch + head // q_share * q_head + i * q_dim
    k += batch * k_batch + head // k_share * k_head + i * k_dim
    v += batch * v_batch + head // v_share * v_head + j * v_dim
    o += program * tokens * columns + j
    for t in range(tokens):
        q_i = tl.load(q + t * q_token, mask=i < rows, other=0.0).to(tl.float32)
        k_i = tl.load(k + t * k_token, mask=i < rows, other=0.0).to(tl.float32)
        v_j = tl.load(v + t * v_token, mask=j < columns, other=0.0).to(tl.float32)
        if log_decay is not None:
            if BY_TOKEN:
                stays, factor = decay(log_decay + program * tokens + t, True)
            held = moved(held, k_i, v_j, stays, factor)
        else:
            held = added(held, k_i, v_j)
        if t + 1 == kept:
            tl.store(pointers, held.to(states.dtype.element_ty), mask=inside)
        total = tl.where(good, tl.sum(q_i[:, None] * held, 0) * scale, float("nan"))
        tl.store(o + t * columns, total.to(o.dtype.element_ty), mask=j < columns)
    if ages is not None:
        first = (head == 0) & (tl.program_id(1) == 0)
        tl.store(ages + slot, tl.load(ages + slot) + kept, mask=first & (kept > 0))
