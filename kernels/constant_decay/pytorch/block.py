"""The local primitives in plain PyTorch: any device, fp64 too.

Decaying linear attention over one shard is four steps, the same in both directions of time and for every operand:

    tile_states    what each tile adds to the state, starting from zero
    fold           the state at each tile's start, a left fold over the tiles
    tile_outputs   the outputs of each tile, from the state at its start
    decay_gradient what each tile adds to the gradient of log_decay

The backward pass needs no kernel of its own. With `LA(a, b, c)_i = sum_{j<=i} gamma^(i-j) (a_i . b_j) c_j`:

    o = LA(q, k, v)    dq = LA(do, v, k)    dv = LA_reversed(k, q, do)    dk = LA_reversed(v, do, q)

with the forward states S for o and dq, and the reversed ones, R, for dk and dv.

Bits: a tile is computed chunk by chunk with matrix products whose shapes depend on the tile length alone, never on how
many tiles are computed together (short chunks are padded with zeros, which adds nothing). Batched products give the
same bits for any batch count as long as every matrix begins on a 64-byte line, so head dimensions are padded with zeros
too; tests/engine/test_exactness.py watches that they go on doing so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch.reused import reused
from leetdist.kernels.constant_decay.pytorch.walk import (
    CHUNK,
    ConstantWalk,
    Walk,
    WalkOf,
    decay_powers,
    distances,
    missing,
    padded,
)

# A tile may be named far longer than the sequence; no table of gamma's powers is longer than this for that alone.
MANY_POWERS = 8192


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of these kernels."""
    return f"chunks of {min(CHUNK, tile)} tokens"


def tile_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float = 1.0,
    to_end: bool = True,
    out: Tensor | None = None,
    walk_of: WalkOf | None = None,
) -> Tensor:
    """The state each tile adds: `scale * sum_i w_i b_i c_i^T`, with `i` counted from 0 in a tile of `n` tokens.

    Forward, `w_i = gamma^(n-1-i)` (the state after the tile); reversed, `w_i = gamma^(i+1)` (the gradient of the state
    before the tile).

    b: (B, Hb, N, Db), c: (B, Hc, N, Dc), where Hb and Hc divide H; log_decay: (H,) fp32. to_end: False leaves out the
    tile that the walk ends with (of a row of one segment), for only the state at the end needs it.
    Returns (B, H, tiles.count, Db, Dc), fp32 (fp64 for fp64 inputs), in `out` (contiguous) if given. What is in the
    place of a tile that was left out means nothing. walk_of: where the weights come from, if not from (H,) decays.
    """
    walk = (walk_of or ConstantWalk)(tiles, log_decay, b.dtype, reverse, tiles.unread(reverse, to_end))
    rows, columns = b.shape[3], c.shape[3]
    states = walk.zeros(b.shape[0], tiles.count, rows + missing(rows), columns + missing(columns))
    for chunk in walk:
        weighted = chunk.take(b) * (chunk.to_state() * scale)
        chunk.advance(states, weighted.mT @ chunk.take(c))
    states = states[..., :rows, :columns]
    return states.contiguous() if out is None else out.copy_(states)


def fold(
    states: Tensor, initial: Tensor | None, log_decay: Tensor, tiles: Tiles, *, reverse: bool, to_end: bool = True
) -> Tensor | None:
    """Turn what each tile adds into the state at each tile's start, in place, and return the state at the end.

    `S_{j+1} = gamma^n S_j + L_j`, rounded after the product and after the sum, from the first tile of each segment to
    its last; reversed, from the last to the first (a tile's "start" is then its right end).

    states: (B, H, tiles.count, Dk, Dv); initial: (B * num_segments, H, Dk, Dv) or None for zeros. to_end: False if
    `tile_states` left out the last tile, which is then not read.
    Returns (B * num_segments, H, Dk, Dv), or None where the last tile was left out.
    """
    longest = max((tokens for _, tokens in tiles.spans), default=0)
    powers = decay_powers(log_decay, min(tiles.size, max(longest, MANY_POWERS)), states.dtype)

    def keep(tile: int) -> Tensor:
        return powers[:, tiles.spans[tile][1], None, None]

    return fold_by(keep, states, initial, tiles, reverse=reverse, to_end=to_end)


def fold_by(
    keep: Callable[[int], Tensor], states: Tensor, initial: Tensor | None, tiles: Tiles, *, reverse: bool, to_end: bool
) -> Tensor | None:
    """`fold`; keep: the factor with which a tile takes over the state before it, (B or 1, H, 1, 1)."""
    batch, heads, _, dk, dv = states.shape
    final = states.new_zeros(batch, tiles.num_segments, heads, dk, dv)
    unread = tiles.unread(reverse, to_end)
    if initial is not None:
        final.copy_(initial.view_as(final))
    for segment, (first, end) in enumerate(zip(tiles.first_tile, tiles.first_tile[1:], strict=False)):
        carry = final[:, segment]
        for tile in reversed(range(first, end)) if reverse else range(first, end):
            if tile == unread:
                states[:, :, tile] = carry
                break
            after = (carry * keep(tile)).add_(states[:, :, tile])
            states[:, :, tile] = carry
            carry = after
        final[:, segment] = carry
    return final.flatten(0, 1) if to_end else None


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
    walk_of: WalkOf | None = None,
) -> Tensor:
    """The outputs of each tile from the state at its start: `scale * LA(a, b, c) + state_scale * w_i a_i . state`.

    Forward, `w_i = gamma^(i+1)`; reversed, `w_i = gamma^(n-1-i)`. Inside a tile the state walks on from chunk to chunk,
    and is read with `state_scale`; so what a chunk adds to it is scaled by `scale / state_scale`.

    a, b: (B, Ha or Hb, N, Da), c: (B, Hc, N, Dc), head counts dividing H; states: (B, H, tiles.count, Da, Dc).
    Returns (B, H, N, Dc) in `out_dtype`, in `out` (last dimension contiguous) if given.

    No output depends on a token that it does not see, not even on a NaN or an infinity there, which a score of 0 would
    pass on. Whatever is not finite shows in the outputs or in the last state, and then all is computed again.
    """
    if out is None:
        out = torch.empty(a.shape[0], states.shape[1], a.shape[2], c.shape[3], dtype=out_dtype, device=a.device)
    scales: dict[str, Any] = {"scale": scale, "state_scale": state_scale}
    walk = (walk_of or ConstantWalk)(tiles, log_decay, a.dtype, reverse)
    if not _outputs(a, b, c, states, walk, out, **scales):
        _outputs_past_lost(a, b, c, states, walk, out, **scales)
    return out


def _outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    walk: Walk[Any],
    out: Tensor,
    *,
    scale: float,
    state_scale: float,
    select: bool = False,
) -> bool:
    """`tile_outputs`, and whether all was finite. select: a score that is masked is 0 even if it is not finite."""
    state, added_scale = padded(states), scale_of_added(scale, state_scale)
    for chunk in walk:
        a_i, b_i, c_i = chunk.take(a), chunk.take(b), chunk.take(c)
        scores = a_i @ b_i.mT
        if select:
            scores = scores.triu_() if walk.reverse else scores.tril_()
        scores = scores.mul_(chunk.pairs() * scale)
        from_state = (a_i @ chunk.of(state)).mul_(chunk.from_state() * state_scale)
        chunk.put(out, (scores @ c_i).add_(from_state))
        chunk.advance(state, (b_i * (chunk.to_state() * added_scale)).mT @ c_i)
    return math.isfinite(out.sum(dtype=walk.dtype) + state.sum())


def _outputs_past_lost(
    a: Tensor, b: Tensor, c: Tensor, states: Tensor, walk: Walk[Any], out: Tensor, **scales: Any
) -> None:
    """`tile_outputs` with zeros in the place of what is not finite in b and c, and NaN for who sees it: of a row of b
    in all columns, of c in its own."""
    lost_b, lost_c = ~torch.isfinite(b), ~torch.isfinite(c)
    clean = b.masked_fill(lost_b, 0), c.masked_fill(lost_c, 0)
    _outputs(a, *clean, states, walk, out, **scales, select=True)
    one = torch.ones_like(a[:, :1, :, :1], dtype=torch.float32)
    undecayed = torch.zeros(states.shape[1], dtype=torch.float32, device=a.device)
    count = ConstantWalk(walk.tiles, undecayed, torch.float32, walk.reverse)
    for lost in (lost_b.any(-1, keepdim=True), lost_c):
        start = states.new_zeros(*states.shape[:3], 1, lost.shape[3], dtype=torch.float32)
        seen = start.new_zeros(*out.shape[:3], lost.shape[3])  # other tokens of the row are not walked here
        _outputs(one, one, lost.float(), start, count, seen, scale=1.0, state_scale=1.0)
        out.masked_fill_(seen > 0, math.nan)


def scale_of_added(scale: float, state_scale: float) -> float:
    """Factor of what a chunk adds to the state inside `tile_outputs`."""
    return 1.0 if scale == state_scale else scale / state_scale


def decay_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    state_grads: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    scale: float,
) -> Tensor:
    """What each tile adds to the gradient of log_decay.

    A tile maps (state at its start) to (its outputs, state at its end), so its share is
    `sum_i scale q_i^T Z_i do_i + <Z_n, R>`, where `Z_i = dS_i/dg` with the start state held fixed,
    `Z_i = gamma (Z_{i-1} + S_{i-1})`, `Z_0 = 0`, and R is the gradient of the state at the tile's end. Every term has
    the sign and size of what it counts. The textbook form, `sum_t t (q_t . dq_t - k_t . dk_t)`, subtracts numbers that
    grow with t, and loses all digits on long sequences.

    q, k, v, do: (B, H or fewer, N, Dk or Dv); states, state_grads: (B, H, tiles.count, Dk, Dv), the state at each
    tile's start and the gradient of the state at its end. Returns (B, H, tiles.count), in fp64.
    """
    walk = ConstantWalk(tiles, log_decay, torch.float64, reverse=False)  # terms of both signs cancel
    state = padded(states.double())
    slope = torch.zeros_like(state)
    total = walk.zeros(q.shape[0], tiles.count)
    for chunk in walk:
        q_i, k_i, v_i, do_i = (chunk.take(x) for x in (q, k, v, do))
        distance, _ = reused(distances, walk.chunk, walk.device, walk.chunk, False)
        pairs = ((q_i @ k_i.mT) * (do_i @ v_i.mT)).tril_(-1)
        near = (pairs * (chunk.pairs() * distance)).sum((-1, -2))
        position = chunk.place.from_state[..., None]
        far = (q_i @ chunk.of(slope)) + (q_i @ chunk.of(state)) * position
        far = (far * chunk.from_state() * do_i).sum((-1, -2))
        total[:, :, chunk.tiles] += (near + far) * scale
        tokens = chunk.place.lengths[:, None, None]
        update = ((k_i * chunk.to_state() * chunk.place.to_state[..., None]).mT) @ v_i
        chunk.advance(slope, update, add=chunk.of(state) * tokens)
        chunk.advance(state, (k_i * chunk.to_state()).mT @ v_i)
    return total + (slope * padded(state_grads.double())).sum((-1, -2))
