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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.pytorch.kept import kept

# Tokens a matrix product works on. 128 was the fastest of 32, 64, 128 and 256 for D = 64 and 128 on two CPU cores.
CHUNK = 128
# From here on gamma is 0 in fp64 too; but gamma^0 is 1, where that of a log-decay of -inf would be NaN.
LEAST = -1e4
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
) -> Tensor:
    """The state each tile adds: `scale * sum_i w_i b_i c_i^T`, with `i` counted from 0 in a tile of `n` tokens.

    Forward, `w_i = gamma^(n-1-i)` (the state after the tile); reversed, `w_i = gamma^(i+1)` (the gradient of the state
    before the tile).

    b: (B, Hb, N, Db), c: (B, Hc, N, Dc), where Hb and Hc divide H; log_decay: (H,) fp32. to_end: False leaves out the
    tile that the walk ends with (of a row of one segment), for only the state at the end needs it.
    Returns (B, H, tiles.count, Db, Dc), fp32 (fp64 for fp64 inputs), in `out` (contiguous) if given. What is in the
    place of a tile that was left out means nothing.
    """
    walk = _Walk(tiles, log_decay, b.dtype, reverse, tiles.unread(reverse, to_end))
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
    batch, heads, _, dk, dv = states.shape
    longest = max((tokens for _, tokens in tiles.spans), default=0)
    powers = decay_powers(log_decay, min(tiles.size, max(longest, MANY_POWERS)), states.dtype)
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
            _, tokens = tiles.spans[tile]
            after = (carry * powers[:, tokens, None, None]).add_(states[:, :, tile])
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
        out = torch.empty(a.shape[0], log_decay.shape[0], a.shape[2], c.shape[3], dtype=out_dtype, device=a.device)
    scales: dict[str, Any] = {"reverse": reverse, "scale": scale, "state_scale": state_scale}
    if not _outputs(a, b, c, states, log_decay, tiles, out, **scales):
        _outputs_past_lost(a, b, c, states, log_decay, tiles, out, **scales)
    return out


def _outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    out: Tensor,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
    select: bool = False,
) -> bool:
    """`tile_outputs`, and whether all was finite. select: a score that is masked is 0 even if it is not finite."""
    walk = _Walk(tiles, log_decay, a.dtype, reverse)
    state, added_scale = padded(states), scale_of_added(scale, state_scale)
    for chunk in walk:
        a_i, b_i, c_i = chunk.take(a), chunk.take(b), chunk.take(c)
        scores = a_i @ b_i.mT
        if select:
            scores = scores.triu_() if reverse else scores.tril_()
        scores = scores.mul_(walk.mask * scale)
        from_state = (a_i @ chunk.of(state)).mul_(chunk.from_state() * state_scale)
        chunk.put(out, (scores @ c_i).add_(from_state))
        chunk.advance(state, (b_i * (chunk.to_state() * added_scale)).mT @ c_i)
    return math.isfinite(out.sum(dtype=walk.dtype) + state.sum())


def _outputs_past_lost(
    a: Tensor, b: Tensor, c: Tensor, states: Tensor, log_decay: Tensor, tiles: Tiles, out: Tensor, **scales: Any
) -> None:
    """`tile_outputs` with zeros in the place of what is not finite in b and c, and NaN for who sees it: of a row of b
    in all columns, of c in its own."""
    lost_b, lost_c = ~torch.isfinite(b), ~torch.isfinite(c)
    clean = b.masked_fill(lost_b, 0), c.masked_fill(lost_c, 0)
    _outputs(a, *clean, states, log_decay, tiles, out, **scales, select=True)
    one, undecayed = torch.ones_like(a[:, :1, :, :1], dtype=torch.float32), torch.zeros_like(log_decay)
    scales |= {"scale": 1.0, "state_scale": 1.0}
    for lost in (lost_b.any(-1, keepdim=True), lost_c):
        start = states.new_zeros(*states.shape[:3], 1, lost.shape[3], dtype=torch.float32)
        seen = start.new_empty(*out.shape[:3], lost.shape[3])
        _outputs(one, one, lost.float(), start, undecayed, tiles, seen, **scales)
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
    walk = _Walk(tiles, log_decay, torch.float64, reverse=False)  # terms of both signs cancel
    state = padded(states.double())
    slope = torch.zeros_like(state)
    total = walk.zeros(q.shape[0], tiles.count)
    for chunk in walk:
        q_i, k_i, v_i, do_i = (chunk.take(x) for x in (q, k, v, do))
        distance, _ = kept(_pairs, walk.chunk, walk.device, walk.chunk, False)
        pairs = ((q_i @ k_i.mT) * (do_i @ v_i.mT)).tril_(-1)
        near = (pairs * (walk.mask * distance)).sum((-1, -2))
        position = chunk.place.from_state[..., None]
        far = (q_i @ chunk.of(slope)) + (q_i @ chunk.of(state)) * position
        far = (far * chunk.from_state() * do_i).sum((-1, -2))
        total[:, :, chunk.tiles] += (near + far) * scale
        tokens = chunk.place.lengths[:, None, None]
        update = ((k_i * chunk.to_state() * chunk.place.to_state[..., None]).mT) @ v_i
        chunk.advance(slope, update, add=chunk.of(state) * tokens)
        chunk.advance(state, (k_i * chunk.to_state()).mT @ v_i)
    return total + (slope * padded(state_grads.double())).sum((-1, -2))


def missing(dim: int) -> int:
    """Zeros that a head dimension is padded with, to a multiple of 64 bytes in fp32."""
    return -dim % 16


def padded(states: Tensor) -> Tensor:
    """A copy of states (..., Dk, Dv) with both dimensions padded."""
    rows, columns = missing(states.shape[-2]), missing(states.shape[-1])
    return F.pad(states, (0, columns, 0, rows)) if rows or columns else states.clone()


def decay_powers(log_decay: Tensor, highest: int, dtype: torch.dtype) -> Tensor:
    """`gamma^0 ... gamma^highest`: (H, highest + 1) in `dtype`, each rounded once from fp64."""
    (exponents,) = kept(_exponents, highest, log_decay.device, highest + 1)
    return torch.exp(log_decay.double().clamp_min(LEAST)[:, None] * exponents).to(dtype)


class _Walk:
    """Walks all tiles at once, chunk after chunk, in one direction of time."""

    def __init__(self, tiles: Tiles, log_decay: Tensor, dtype: torch.dtype, reverse: bool, unread: int = -1) -> None:
        self.tiles, self.reverse, self.unread = tiles, reverse, unread
        self.heads = log_decay.shape[0]
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.device = log_decay.device
        self.chunk = min(CHUNK, tiles.size)
        self.powers = decay_powers(log_decay, max(self.chunk, 1), self.dtype)

    @cached_property
    def mask(self) -> Tensor:
        """(H, 1, C, C): gamma^distance where the second token is not later in the direction of the walk, else 0."""
        distance, seen = kept(_pairs, self.chunk, self.device, self.chunk, self.reverse)
        return (self.powers[:, distance] * seen)[:, None]

    def zeros(self, batch: int, *shape: int) -> Tensor:
        return torch.zeros(batch, self.heads, *shape, dtype=self.dtype, device=self.device)

    def __iter__(self) -> Iterator[_Chunk]:
        tiles = self.tiles
        for place in kept(_places, tiles.num_tokens, self.device, tiles, self.chunk, self.reverse, self.unread):
            yield _Chunk(self, place)


def _exponents(device: torch.device, count: int) -> Iterator[Tensor]:
    yield torch.arange(count, device=device, dtype=torch.float64)


def _pairs(device: torch.device, chunk: int, reverse: bool) -> Iterator[Tensor]:
    """(C, C) each: how far the second token is behind the first, at least 0; whether the first sees it."""
    position = torch.arange(chunk, device=device)
    distance = position[:, None] - position
    if reverse:
        distance = distance.T
    yield distance.clamp_min(0)
    yield distance >= 0


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the tokens are of one chunk of every tile that still has one. Of A tiles, with C tokens in a chunk:

    lengths: (A,), tokens of each; rows: (A * C,), each token's number in the row; outside: (A, C, 1), where there is
    no token; from_state, to_state: (A, C), the powers of gamma between a token and the state at the chunk's start, and
    at its end.
    """

    tiles: slice | Tensor
    lengths: Tensor
    rows: Tensor
    outside: Tensor
    full: bool
    from_state: Tensor
    to_state: Tensor


def _places(device: torch.device, tiles: Tiles, chunk: int, reverse: bool, unread: int) -> Iterator[_Place]:
    table = tiles.table(device)
    start, length = table[:, 0], table[:, 1]
    position = torch.arange(chunk, device=device)
    chunks = [ceil_div(tokens, chunk) for _, tokens in tiles.spans]
    if unread >= 0:
        chunks[unread] = 0
    for step in range(max(chunks, default=0)):
        active = [tile for tile, count in enumerate(chunks) if count > step]
        which = torch.tensor(active, device=device)
        number = [chunks[t] - 1 - step if reverse else step for t in active]
        offset = torch.tensor(number, dtype=torch.int64, device=device) * chunk
        lengths = (length[which] - offset).clamp_max(chunk)
        outside = position >= lengths[:, None]
        before, after = position.expand(outside.shape), (lengths[:, None] - 1 - position).clamp_min(0)
        yield _Place(
            tiles=slice(active[0], active[-1] + 1) if len(active) == active[-1] + 1 - active[0] else which,
            lengths=lengths,
            rows=((start[which] + offset)[:, None] + torch.minimum(position, lengths[:, None] - 1)).flatten(),
            outside=outside[..., None],
            full=not outside.any(),
            from_state=after if reverse else before + 1,
            to_state=before + 1 if reverse else after,
        )


class _Chunk:
    """One chunk of every tile that still has one."""

    def __init__(self, walk: _Walk, place: _Place) -> None:
        self.walk, self.place, self.tiles = walk, place, place.tiles

    def take(self, x: Tensor) -> Tensor:
        """The chunk's rows of x (B, Hx, N, D), for every head: (B, H, A, C, padded D), zero where there is no token."""
        x = x.index_select(2, self.place.rows).to(self.walk.dtype)
        if missing(x.shape[3]):
            x = F.pad(x, (0, missing(x.shape[3])))
        x = x.unflatten(2, self.place.outside.shape[:2])
        if not self.place.full:
            x = x.masked_fill(self.place.outside, 0)
        return x if x.shape[1] == self.walk.heads else x.repeat_interleave(self.walk.heads // x.shape[1], 1)

    def put(self, out: Tensor, x: Tensor) -> None:
        x, rows = x.flatten(2, 3)[..., : out.shape[3]], self.place.rows
        if not self.place.full:
            inside = ~self.place.outside.flatten()
            x, rows = x[:, :, inside], rows[inside]
        out.index_copy_(2, rows, x.to(out.dtype))

    def of(self, state: Tensor) -> Tensor:
        return state[:, :, self.tiles]

    def from_state(self) -> Tensor:
        """(H, A, C, 1)"""
        return self.walk.powers[:, self.place.from_state, None]

    def to_state(self) -> Tensor:
        """(H, A, C, 1)"""
        return self.walk.powers[:, self.place.to_state, None]

    def advance(self, state: Tensor, update: Tensor, add: Tensor | None = None) -> None:
        """state = gamma^length (state + add) + update, on the tiles of this chunk."""
        across = self.walk.powers[:, self.place.lengths, None, None]
        old = self.of(state)  # a view if all tiles have this chunk, else a copy
        state[:, :, self.tiles] = (old if add is None else old.add_(add)).mul_(across).add_(update)
