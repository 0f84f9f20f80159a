"""How layers call the operator: over a sequence, for a token of decoding, or with one set of bits for both."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from leetdist.api import linear_attention, linear_attention_step
from leetdist.inference.attend import attend
from leetdist.nn.checks import as_return_state
from leetdist.sequence.group import is_alone


def attended(
    layer: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Any,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Any]:
    """o, and with return_state the state after it, else None; the rest is as `linear_attention` takes it. layer: its
    group, tile and exact count, and whether a step of decoding overwrites its state (`inplace`)."""
    return_state = as_return_state(return_state, q, layer.group)
    if layer.exact:
        o, final = attend(
            q, k, v, log_decay,
            scale=scale, tile=layer.tile, state=state, keep=return_state, cu_seqlens=cu_seqlens, group=layer.group,
        )  # fmt: skip
    elif state is not None and q.shape[2] == 1 and cu_seqlens is None and is_alone(layer.group):
        o, final = linear_attention_step(q, k, v, state, log_decay, scale=scale, inplace=layer.inplace)
    else:
        call = partial(
            linear_attention, q, k, v, log_decay,
            scale=scale, initial_state=state, cu_seqlens=cu_seqlens, group=layer.group, tile=layer.tile,
        )  # fmt: skip
        o, final = call(return_state=True) if return_state else (call(), None)
    return o, final if return_state else None


__all__ = ["attended"]
