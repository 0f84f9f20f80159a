"""The definition: the masked product of all pairs of tokens.

Algorithm: `O = ((Q K^T) . M) V`, `M_ij = gamma^(i-j)` for i >= j; with a decay a token, the product of theirs from
j + 1 to i.
Time: O(N^2 (Dk + Dv)); memory: O(N^2).
Backend: PyTorch; fp32 arithmetic for 16-bit dtypes. Backward: PyTorch's own, so it can be differentiated twice. For one
device: debugging, teaching, short sequences.

Source: RetNet, arXiv 2307.08621, eq. 5 (parallel form); LeetDecoding, arXiv 2501.02573, eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.operators.methods.weights import weights_of


def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """One sequence, unscaled: o (B, H, N, Dv). q, k: (B, H, N, Dk), v: (B, H, N, Dv), all of the state's dtype;
    log_decay: (H,) or (B, H, N), finite; initial_state: (B, H, Dk, Dv)."""
    pairs = weights_of(log_decay).pairs(q.shape[2])
    o = masked_product(q[:, :, None], k[:, :, None], v[:, :, None], pairs)[:, :, 0]
    return from_state(o, q, log_decay, initial_state)


def from_state(o: Tensor, q: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """Outputs from a zero state made outputs from `initial_state`."""
    if initial_state is None:
        return o
    return o + weights_of(log_decay).from_start(q.shape[2])[..., 0, :, :] * (q @ initial_state)


def state_after(k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state after the last token, (B, H, Dk, Dv)."""
    weights, tokens = weights_of(log_decay), k.shape[2]
    state = (k * weights.to_end(tokens)[..., 0, :, :]).mT @ v
    if initial_state is None:
        return state
    return state + weights.across(tokens)[..., 0, :, :] * initial_state


def masked_product(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """`((Q K^T) . M) V` in segments, (B, H, segments, length, D); pairs: M, and anything above its diagonal.

    What M masks is left out, not only multiplied by 0, which would pass on a NaN or an infinity of a later token: in v
    it counts as 0, and its column is NaN from there on. (Gradients are PyTorch's: one NaN may be all over its head.)
    """
    bad = v.detach() * 0 != 0  # as NaN is
    o = ((q @ k.mT).tril() * pairs) @ v.masked_fill(bad, 0)
    seen_bad = bad.cumsum(-2) > 0  # of whole numbers: CUDA's sums of others have no fixed order
    return o * torch.where(seen_bad, torch.nan, 1.0)
