"""What inference calls ask for, checked once: the only place where their inputs are validated.

The operator's own arguments are `leetdist.engine.problem`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.engine.problem import ONE_DEVICE, describe

if TYPE_CHECKING:
    from leetdist.inference.state import State


def check_steps(q: Tensor, k: Tensor, v: Tensor, states: Tensor, index: Tensor | None, lengths: Tensor | None) -> None:
    """The pooled states of a decoding call, and which of them its rows work on. Values stay unread: see there."""
    batch, heads, _, dk = q.shape
    if not isinstance(states, Tensor):
        raise ValueError(f"states must be a tensor, got {type(states).__name__}")
    if states.ndim != 4 or tuple(states.shape[1:]) != (heads, dk, v.shape[3]):
        raise ValueError(
            f"states must have shape (slots, H, Dk, Dv) = (slots, {heads}, {dk}, {v.shape[3]}), "
            f"got {tuple(states.shape)}"
        )
    if index is None and states.shape[0] != batch:
        raise ValueError(f"states must have a slot for each of the {batch} rows, or index be given")
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    if states.dtype not in (full, torch.bfloat16):
        raise ValueError(f"states must be {full} or torch.bfloat16, got {states.dtype}")
    if states.device != q.device:
        raise ValueError(f"states must be on q's device, {q.device}, got {states.device}")
    for name, x in (("index", index), ("lengths", lengths)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be an int32 or int64 tensor, got {got}")
        if x.shape != (batch,):
            raise ValueError(f"{name} must have shape (B,) = ({batch},), got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}")


def check_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    tile: int,
    method: str,
    *,
    ranks: int = 1,
    after: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """One piece of a stream; `after`: the state, keys and values that it continues."""
    if method in ONE_DEVICE:
        raise ValueError(f"method must be one that works tile by tile, got {method!r}: it takes a sequence as a whole")
    describe(
        q, k, v, log_decay, ranks=ranks,
        scale=scale, initial_state=None if after is None else after[0], return_state=True,
        cu_seqlens=None, method=method, tile=tile,
    )  # fmt: skip
    if after is None:
        return
    _, keys, _ = after
    if k.dtype != keys.dtype:
        raise ValueError(f"this piece must have the dtype of those before it, {keys.dtype}, got {k.dtype}")
    if k.shape[1] != keys.shape[1]:
        raise ValueError(f"k must have as many heads as in the pieces before, {keys.shape[1]}, got {k.shape[1]}")


def check_shards(everyone: list[Any], rank: int, tile: int) -> tuple[int, int, int]:
    """A piece of a stream over ranks, of which each told its (tokens, tokens before, tokens in its open tile).

    Returns the rank that holds the piece's short last tile, the tokens in it, and the tokens in whole tiles; raises
    the same error on every rank.
    """
    for other, told in enumerate(everyone):
        if isinstance(told, ValueError):
            raise told if other == rank else ValueError(f"rank {other} has a bad piece: {told}")
    lengths = [tokens for tokens, _, _ in everyone]
    for other, (_, before, open_) in enumerate(everyone):
        if before != everyone[0][1]:
            raise ValueError(
                f"the ranks' streams are not at one token: rank {other} is at {before}, rank 0 at {everyone[0][1]}"
            )
        if open_:
            raise ValueError(
                f"under a group, pieces but the last must have a multiple of the tile length {tile} in tokens: the "
                f"pieces before this one ended {open_} tokens into a tile"
            )
    total = sum(lengths)
    if not total:
        raise ValueError("q: N is 0 on every rank; a piece needs at least one token")
    owner = max(other for other, tokens in enumerate(lengths) if tokens)
    if lengths[owner] < total % tile:
        raise ValueError(
            f"shard boundaries must lie on the tile grid: the last {total % tile} tokens of this piece are one tile "
            f"of {tile}, and rank {owner} has {lengths[owner]} of them"
        )
    return owner, total % tile, total - total % tile


def check_like(state: State, like: State) -> None:
    """A state of the same operator as `like`, of any batch and age."""
    for name in ("tile", "scale", "method"):
        got, wanted = getattr(state, name), getattr(like, name)
        if got != wanted:
            raise ValueError(f"the state was made with {name} {got}, wanted {wanted}")
    for name in ("boundary", "k", "v"):
        got, wanted = getattr(state, name), getattr(like, name)
        if (got.shape[1], got.shape[3]) != (wanted.shape[1], wanted.shape[3]):
            raise ValueError(
                f"the state has {got.shape[1]} heads of {got.shape[3]} in {name}, wanted {wanted.shape[1]} of "
                f"{wanted.shape[3]}"
            )
        if got.dtype != wanted.dtype:
            raise ValueError(f"the state's {name} is {got.dtype}, wanted {wanted.dtype}")
    if state.boundary.shape[2] != like.boundary.shape[2]:
        raise ValueError(f"the state has Dk = {state.boundary.shape[2]}, wanted {like.boundary.shape[2]}")
    if state.log_decay is not like.log_decay and not torch.equal(state.log_decay.cpu(), like.log_decay.cpu()):
        raise ValueError(
            f"the state was made with log_decay {_shown(state.log_decay)}, wanted {_shown(like.log_decay)}"
        )


def _shown(log_decay: Tensor) -> str:
    values = log_decay.tolist()
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
