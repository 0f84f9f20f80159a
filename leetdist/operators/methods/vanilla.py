"""The definition: the masked product of all pairs of tokens.

Algorithm: `O = ((Q K^T) . M) V`, `M_ij = gamma^(i-j)` for i >= j.
Time: O(N^2 (Dk + Dv)); memory: O(N^2).
Backend: PyTorch; fp32 arithmetic for 16-bit dtypes. Backward: PyTorch's own, so it can be differentiated twice. For one
device: debugging, teaching, short sequences.

Source: RetNet, arXiv 2307.08621, eq. 5 (parallel form); LeetDecoding, arXiv 2501.02573, eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """One sequence, unscaled: o (B, H, N, Dv). q, k: (B, H, N, Dk), v: (B, H, N, Dv), all of the state's dtype;
    log_decay: (H,), finite; initial_state: (B, H, Dk, Dv)."""
    return from_state(masked_product(q, k, v, log_decay), q, log_decay, initial_state)


def from_state(o: Tensor, q: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """Outputs from a zero state made outputs from `initial_state`."""
    if initial_state is None:
        return o
    tokens = torch.arange(q.shape[2], device=q.device)
    return o + powers(log_decay, tokens + 1) * (q @ initial_state)


def state_after(k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state after the last token, (B, H, Dk, Dv)."""
    tokens = torch.arange(k.shape[2], device=k.device)
    state = (k * powers(log_decay, tokens.flip(0))).mT @ v
    if initial_state is None:
        return state
    return state + powers(log_decay, tokens.new_tensor([len(tokens)])) * initial_state


def masked_product(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """`((Q K^T) . M) V` over the last two dimensions of (B, H, ..., N, D).

    What M masks is left out, not only multiplied by 0, which would pass on a NaN or an infinity of a later token: in v
    it counts as 0, and its column is NaN from there on. (Gradients are PyTorch's: one NaN may be all over its head.)
    """
    tokens = torch.arange(q.shape[-2], device=q.device)
    distance = tokens[:, None] - tokens
    g = log_decay.view(-1, *[1] * (q.ndim - 2))
    mask = torch.exp(g * distance.clamp_min(0))
    bad = v.detach() * 0 != 0  # as NaN is
    o = ((q @ k.mT).tril() * mask) @ v.masked_fill(bad, 0)
    seen_bad = bad.cumsum(-2) > 0  # of whole numbers: CUDA's sums of others have no fixed order
    return o * torch.where(seen_bad, torch.nan, 1.0)


def powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """gamma^exponents: (H, exponents, 1)."""
    return torch.exp(log_decay[:, None] * exponents)[..., None]
