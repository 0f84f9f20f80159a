"""One canonical form of every argument: what the engine and its kernels may assume.

Options are plain Python values (`canonical_options`); q, k, v and incoming gradients have a contiguous last dimension,
and any other strides (`row_major`); log_decay and states are contiguous, in the states' dtype (`canonical_tensors`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leetdist.arguments import as_bool, as_float, as_str, as_tile
from leetdist.engine.layout import contiguous, row_major
from leetdist.engine.values import never_read, still
from leetdist.operators.problem import state_dtype


def a_head(log_decay: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Decays of (H, 1, 1), in which other libraries keep theirs, as (H,); any other as it is."""
    if not isinstance(log_decay, Tensor) or log_decay.is_nested or log_decay.ndim != 3:
        return log_decay  # as most are
    if not all(isinstance(x, Tensor) and not x.is_nested for x in (q, k, v)):
        return log_decay  # of which some have no sizes
    if log_decay.shape[1:] == (1, 1) and q.ndim == k.ndim == v.ndim == 4:
        heads = max(x.shape[1] for x in (q, k, v))
        if log_decay.shape[0] == heads and log_decay.shape != (q.shape[0], heads, q.shape[2]):
            return log_decay.flatten()
    return log_decay


def canonical_options(
    *, scale: Any, return_state: Any, method: Any, tile: Any, precision: Any, **others: Any
) -> dict[str, Any]:
    """The options of a call by name, each of the one type that stands for its value, so that equal options are the
    same options; ValueError where one has none."""
    if type(scale) is not float:
        scale = as_float("scale", scale)
    if type(return_state) is not bool:
        return_state = as_bool("return_state", return_state)
    if type(method) is not str:
        method = as_str("method", method)
    if tile is not None and type(tile) is not int:
        tile = as_tile(tile)
    if precision is not None and type(precision) is not str:
        precision = as_str("precision", precision, 'None, "tf32" or "high"')
    return {
        "scale": scale, "return_state": return_state, "method": method, "tile": tile, "precision": precision, **others
    }  # fmt: skip


def canonical_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    highest: tuple[float, ...] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, log_decay and initial_state as kernels take them; differentiable. No decay is a log_decay of zeros.

    highest: the log-decays for which the call's plan is right (leetdist.engine.plan.Plan.highest).
    """
    dtype = state_dtype(q.dtype)
    if log_decay is None:
        heads = max(q.shape[1], k.shape[1], v.shape[1])
        log_decay = torch.zeros(heads, dtype=dtype, device=q.device)
    if highest is None and log_decay.ndim == 1 and never_read(log_decay):
        highest = (0.0,) * log_decay.shape[0]
    log_decay = contiguous(log_decay, dtype)
    if cu_seqlens is not None or highest is not None:
        log_decay = still(log_decay, cu_seqlens, highest)
    if initial_state is not None:
        initial_state = contiguous(initial_state, dtype)
    return row_major(q), row_major(k), row_major(v), log_decay, initial_state
