"""The local primitives of a decay a token in plain PyTorch: those of a constant decay, with other weights.

Each is what leetdist.kernels.constant_decay.pytorch.block says of it, with log_decay (B, H, N) in the states' dtype
(-inf allowed), and its weights from leetdist.kernels.token_decay.pytorch.walk: chunks have the same tokens, products
the same shapes, so a log_decay of zeros gives the bits of no decay. What `fold` takes of the decays is what
`transitions` makes of them, one factor a tile; and the decays' gradient is one number a token.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block
from leetdist.kernels.constant_decay.pytorch.walk import CHUNK, padded
from leetdist.kernels.token_decay.pytorch.walk import TokenDecayWalk, running_sums

configuration = block.configuration
tile_states = partial(block.tile_states, walk_of=TokenDecayWalk)
tile_outputs = partial(block.tile_outputs, walk_of=TokenDecayWalk)

# Bytes of states, a chunk each, that the gradient of one go at the heads may take.
MOST_BYTES = 1 << 28


def weighted_values(v: Tensor, weight: Tensor) -> Tensor:
    """v (B, H, N, D) times weight (B, H, N) in the states' dtype, rounded to v's without a wide copy between; in memory
    (B, N, H, D). Kernels that take both have the same bits, or None here (leetdist.operators.token_decay)."""
    batch, heads, tokens, dim = v.shape
    out = v.new_empty(batch, tokens, heads, dim)
    return torch.mul(v.transpose(1, 2), weight.transpose(1, 2)[..., None], out=out).transpose(1, 2)


def transitions(log_decay: Tensor, tiles: Tiles) -> Tensor:
    """The factor with which each tile takes over the state before it: exp of the sum of its log-decays.

    log_decay: (B, H, N). Returns (B, H, tiles.count) in its dtype, summed in fp64, chunk after chunk.
    """
    walk = TokenDecayWalk(tiles, log_decay, log_decay.dtype, reverse=False)
    total = log_decay.new_zeros(*log_decay.shape[:2], tiles.count, dtype=torch.float64)
    for chunk in walk:
        total[:, :, chunk.tiles] += chunk.total()
    return total.exp_().to(walk.dtype)


def fold(
    states: Tensor, initial: Tensor | None, keep: Tensor, tiles: Tiles, *, reverse: bool, to_end: bool = True
) -> Tensor | None:
    """`S_{j+1} = keep_j S_j + L_j`, rounded after the product and after the sum; keep: (B, H, tiles.count)."""

    def keep_of(tile: int) -> Tensor:
        return keep[:, :, tile, None, None]

    return block.fold_by(keep_of, states, initial, tiles, reverse=reverse, to_end=to_end)


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
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of log_decay, (B, H, N) in its dtype; in `out` if given, where other tiles' may be.

    In a chunk with state S at its start and R the gradient of the state at its end, token t's decay is a factor of all
    that passes it, `j < t <= i`:

        dg_t = sum_{j<t<=i} M_ij + sum_{i>=t} A_i + sum_{j<t} B_j + E

        M_ij = scale exp(G_i - G_j) (q_i . k_j) (v_j . do_i)      from token to token
        A_i  = scale exp(G_i) q_i^T S do_i                        from the state at the start to a token
        B_j  = exp(G_n - G_j) k_j^T R v_j                         from a token to the state at the end
        E    = exp(G_n) <S, R>                                    from state to state

    Every term is a product that counts, and none is taken away again. The textbook form, the sum of `q_i . dq_i - k_i .
    dk_i` over the tokens from t on, subtracts numbers that grow with the distance from the end.

    Arguments as leetdist.kernels.constant_decay.pytorch.block.decay_gradient; computed in fp64, as terms of both signs
    cancel.
    """
    heads = log_decay.shape[1]
    chunk_states = 2 * q.shape[0] * heads * (tiles.num_tokens // CHUNK) * states.shape[3] * states.shape[4] * 8
    if out is None:
        out = torch.empty_like(log_decay)
    together = 1 if chunk_states > MOST_BYTES else heads
    for first in range(0, heads, together):
        own = [
            x[:, first * x.shape[1] // heads : ((first + together) * x.shape[1] - 1) // heads + 1]
            for x in (q, k, v, do, states, state_grads, log_decay, out)
        ]
        _decay_gradient(*own, tiles=tiles, scale=scale)
    return out


def _decay_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    state_grads: Tensor,
    log_decay: Tensor,
    out: Tensor,
    *,
    tiles: Tiles,
    scale: float,
) -> None:
    q, k, v, do, exact = (x.double() for x in (q, k, v, do, log_decay))
    chunks, inside_tiles = tiles.finer(min(CHUNK, tiles.size))
    keep = transitions(exact, chunks)

    def at_chunks(b: Tensor, c: Tensor, at_tiles: Tensor, *, scale: float, reverse: bool) -> Tensor:
        added = tile_states(b, c, exact, chunks, reverse=reverse, scale=scale)
        fold(added, at_tiles.double().transpose(1, 2).flatten(0, 1), keep, inside_tiles, reverse=reverse)
        return padded(added)

    starts = at_chunks(k, v, states, scale=1.0, reverse=False)
    ends = at_chunks(q, do, state_grads, scale=scale, reverse=True)
    total = out.double()[..., None]
    later = exact.new_ones(chunks.size, chunks.size).triu()
    for chunk in TokenDecayWalk(chunks, exact, torch.float64, reverse=False):
        q_i, k_i, v_i, do_i = (chunk.take(x) for x in (q, k, v, do))
        start, end = chunk.of(starts), chunk.of(ends)
        pairs = ((q_i @ k_i.mT).mul_(do_i @ v_i.mT)).mul_(chunk.pairs()).tril_(-1)
        passing = later @ pairs  # by t and j: those from j to t or later
        near = passing.tril_(-1).sum(-1)
        read = ((q_i @ start).mul_(do_i) * chunk.from_state()).sum(-1)
        near = (near + running_sums(read.flip(-1), -1).flip(-1)).mul_(scale)
        written = ((k_i @ end).mul_(v_i) * chunk.to_state()).sum(-1)
        before = running_sums(F.pad(written[..., :-1], (1, 0)), -1)  # taking the last away again would leave rounding
        kept = (start * end).mul_(chunk.across()).sum((-1, -2))[..., None]
        chunk.put(total, (near + before + kept)[..., None])
    out.copy_(total[..., 0])
