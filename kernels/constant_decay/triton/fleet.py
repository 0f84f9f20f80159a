"""FleetAttention's outputs in Triton: for GPUs without cuda-core, where constant_decay.cuda.token_scan cannot run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.memory import empty_outputs
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.configs import padded
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, span
from leetdist.kernels.runtime.triton_launch import launch

# Elements of the state that a program, one warp, keeps in its registers: 128 of a thread's 255.
HELD = 4096


def tile_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """See constant_decay.pytorch.block.tile_outputs. The columns are shared out over programs of one warp each."""
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    held = min(max(HELD // padded(rows), 16), padded(columns))
    if out is None:
        out = empty_outputs(a, c, log_decay, out_dtype)
    # A slow decay adds state * (gamma - 1): see leetdist.kernels.constant_decay.pytorch.causal_dot_product.Decay.
    exact = log_decay.double()
    slow = exact > -0.7
    decays = torch.stack((torch.where(slow, torch.expm1(exact), torch.exp(exact)), slow.double()), 1)
    if out.numel():
        launch(
            _fleet_outputs,
            (batch * heads * tiles.count, ceil_div(columns, held)),
            (
                a, b, c, states, decays.float(), out, tiles.needed_table(a.device),
                *a.stride()[:3], *b.stride()[:3], *c.stride()[:3], *out.stride()[:3], *states.stride(),
                heads, heads // a.shape[1], heads // b.shape[1], heads // c.shape[1],
                a.shape[2], tiles.count, tiles.size, rows, columns, scale, state_scale,
            ),
            {"REGULAR": tiles.regular, "REVERSE": reverse, "ROWS": padded(rows), "COLUMNS": held},
            num_warps=1, num_stages=1,
        )  # fmt: skip
    return out


@triton.jit
def _decayed(state, decay, slow):
    if slow > 0:
        state += state * decay
    else:
        state *= decay
    return state


@triton.jit(do_not_specialize=COUNTS)
def _fleet_outputs(
    a, b, c, states, decays, out, table,
    a_batch, a_head, a_token, b_batch, b_head, b_token, c_batch, c_head, c_token,
    out_batch, out_head, out_token, state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, tile_size, rows, columns, scale, state_scale,
    REGULAR: tl.constexpr, REVERSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    i, j = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = start + (length - 1 if REVERSE else 0)
    step = -1 if REVERSE else 1
    a += batch * a_batch + head // a_share * a_head + first * a_token
    b += batch * b_batch + head // b_share * b_head + first * b_token
    c += batch * c_batch + head // c_share * c_head + first * c_token
    out += batch * out_batch + head * out_head + first * out_token
    decay, slow = tl.load(decays + 2 * head), tl.load(decays + 2 * head + 1)

    states += batch * state_batch + head * state_head + tile * state_tile
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    state = tl.load(states + i[:, None] * state_row + j[None, :] * state_column, mask=inside, other=0.0)
    state *= state_scale
    if not REVERSE:
        state = _decayed(state, decay, slow)
    for _ in range(length):
        a_t = tl.load(a + i, mask=i < rows, other=0.0).to(tl.float32)
        b_t = tl.load(b + i, mask=i < rows, other=0.0).to(tl.float32)
        c_t = tl.load(c + j, mask=j < columns, other=0.0).to(tl.float32) * scale
        state += b_t[:, None] * c_t[None, :]
        o = tl.sum(state * a_t[:, None], 0)
        tl.store(out + j, o.to(out.dtype.element_ty), mask=j < columns)
        state = _decayed(state, decay, slow)
        a += step * a_token
        b += step * b_token
        c += step * c_token
        out += step * out_token
