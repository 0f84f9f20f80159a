"""The operator in a model that trains and decodes with one set of bits: its tile is pinned, its state a `State`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.api import linear_attention
from leetdist.engine.ops import shared
from leetdist.inference.checks import told_of_piece
from leetdist.inference.pool import StatePool
from leetdist.inference.state import State
from leetdist.inference.stream import stream
from leetdist.sequence.group import resolve

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

# Tokens of a tile where a model names none: short enough for prompts over a few ranks.
TILE = 1024


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    tile: int | None = None,
    state: Any = None,
    keep: bool = False,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Tensor, Any]:
    """o and, where it is kept, the state: a new `State`, or the `StatePool` given, whose first B slots moved on. The
    outputs are those of one call over all tokens, however they come: arguments as `linear_attention` takes them."""
    tile = tile or TILE
    if state is None and not keep:
        o = linear_attention(
            q, k, v, log_decay, scale=scale, cu_seqlens=cu_seqlens, method="block", group=group, tile=tile
        )
        return o, None
    with told_of_piece(None if isinstance(state, StatePool) else shared(resolve(group), q)):
        _check_kept(state, cu_seqlens, q, k, v, log_decay)
    own = (log_decay,) if log_decay.ndim == 3 else ()
    if isinstance(state, StatePool):
        index = torch.arange(q.shape[0], device=q.device)
        return state.steps(q, k, v, index, log_decay=own[0] if own else None), state
    if state is None:
        running = stream(None if own else log_decay, scale=scale, tile=tile, group=group)
    else:
        running = stream(state=state, group=group)
    return running.push(q, k, v, *own), running.state


def _check_kept(state: Any, cu_seqlens: Tensor | None, *given: Tensor) -> None:
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None where an exact layer keeps a state: a state is of one sequence a row")
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError("an exact layer's state has no gradient: ask for it, and give one, under torch.no_grad()")
    if state is not None and not isinstance(state, (State, StatePool)):
        raise ValueError(f"state must be a State or an exact StatePool in an exact layer, got {type(state).__name__}")


__all__ = ["TILE", "attend"]
