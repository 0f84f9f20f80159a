"""Decoding in plain PyTorch: a few tokens of many requests, on states that stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> Tensor:
    """`S_t = gamma S_{t-1} + k_t v_t^T`, `o_t = scale q_t^T S_t` for T tokens of B requests.

    q: (B, H, T, Dk), k, v: (B, Hkv, T, Dk or Dv); states: (slots, H, Dk, Dv), where row b works on slot `index[b]`
    (b without an index) and keeps what it is after `lengths[b]` tokens (T without lengths). All T outputs are
    computed in any case: (B, H, T, Dv) in q's dtype. No value is read on the host, so that a CUDA graph can hold it.

    Whatever T, the operations on a token are the same, so T tokens at once give the bits of T calls of one token.
    """
    share = q.shape[1] // k.shape[1]
    held = states if index is None else states.index_select(0, index)
    state = held.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    q, k, v = q.to(state.dtype), *(x.to(state.dtype).repeat_interleave(share, 1) for x in (k, v))
    gamma = None if log_decay is None else torch.exp(log_decay).to(state.dtype)[:, None, None]
    kept, outputs = state, []
    for t in range(q.shape[2]):
        token = slice(t, t + 1)
        state = state if gamma is None else state * gamma
        state = state + k[:, :, token].mT * v[:, :, token]
        outputs.append((q[:, :, token].mT * state).sum(2, keepdim=True) * scale)
        kept = state if lengths is None else torch.where(lengths[:, None, None, None] > t, state, kept)
    if index is None:
        states.copy_(kept)
    else:
        states.index_copy_(0, index, kept.to(states.dtype))
    return torch.cat(outputs, 2)
