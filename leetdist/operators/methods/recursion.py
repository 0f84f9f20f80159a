"""Divide and conquer over the sequence.

Algorithm: cut the sequence in halves, solve each, and add to the right half what the left one hands over, the state
`K_left^T V_left`: `O_right += gamma^i Q_right S_left`. Here from the leaves up, all pairs of one level at once; leaves
of 64 tokens are masked products.
Time: O(N log N Dk Dv); memory: O(N / 64 x Dk Dv).
Backend: PyTorch; fp32 arithmetic for 16-bit dtypes. Backward: PyTorch's own, so it can be differentiated twice. For one
device: debugging, teaching, short sequences.

Source: LeetDecoding, arXiv 2501.02573, section 3 (recursion).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from leetdist.operators.methods.vanilla import from_state, masked_product
from leetdist.operators.methods.weights import weights_of

LEAF = 64


def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """As leetdist.operators.methods.vanilla.attention."""
    tokens, half = q.shape[2], LEAF
    while half < tokens:
        half *= 2
    # Zeros behind the last token add nothing, and their own outputs are dropped.
    q_i, k_i, v_i = (pad(x, (0, 0, 0, half - tokens)).unflatten(2, (-1, LEAF)) for x in (q, k, v))
    weights = weights_of(log_decay if log_decay.ndim == 1 else pad(log_decay, (0, half - tokens)))
    o = masked_product(q_i, k_i, v_i, weights.pairs(LEAF))
    half = LEAF
    while half < o.shape[2] * o.shape[3]:
        # (B, H, pairs, 2, half, D): left and right halves
        q_i, k_i, v_i, o = (x.flatten(2, 3).unflatten(2, (-1, 2, half)) for x in (q_i, k_i, v_i, o))
        left_end, right_start = weights.to_end(half), weights.from_start(half)
        if left_end.shape[-3] > 1:  # one for each segment, of which every second is a left half
            left_end, right_start = left_end[..., 0::2, :, :], right_start[..., 1::2, :, :]
        left = (left_end * k_i[:, :, :, 0]).mT @ v_i[:, :, :, 0]
        right = right_start * (q_i[:, :, :, 1] @ left)
        o = torch.stack((o[:, :, :, 0], o[:, :, :, 1] + right), 3).flatten(3, 4)
        q_i, k_i, v_i = (x.flatten(3, 4) for x in (q_i, k_i, v_i))
        half *= 2
    o = o.flatten(2, 3)[:, :, :tokens]
    return from_state(o, q, log_decay, initial_state)
