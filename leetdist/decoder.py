"""LeetDecoding's own entry point, on leetdist's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from leetdist.api import linear_attention
from leetdist.engine.problem import check_gamma, check_qkv

# LeetDecoding's names. Those that differ in the backend alone are one method here, which chooses its backend itself.
METHOD_OF = {
    "vanilla": "vanilla",
    "lightningAttention2": "lightning",
    "lightningAttention2_torch": "lightning",
    "FleetAttention": "fleet",
    "FleetAttention_torch": "fleet",
    "causal_dot_product": "causal_dot_product",
    "causal_dot_product_torch": "causal_dot_product",
    "recursion": "recursion",
    "block-based": "block",
}
# log(0) stands for a decay to nothing after one token; so does this, times any number of tokens, without a NaN at 0.
LOWEST_LOG_DECAY = -1e4


def causal_linear_decoder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_mask_weight: bool = False,
    gamma: Tensor | None = None,
    is_need_exp: bool = True,
    attn_method: str | None = None,
) -> Tensor:
    """LeetDecoding's own function: `((Q K^T) . M) V`, unscaled, with `M_ij = decay^(i-j)` for i >= j, else 0.

    The decay is exp(-gamma) with `is_need_exp`, gamma itself without: for every method, dtype and length alike.
    Differentiable in q, k, v and gamma.

    Args:
        q, k: (B, H, N, rank), fp32, fp16, bf16 or fp64.
        v: (B, H, N, dim), same dtype and device.
        is_mask_weight: decay at all; without it `gamma` must be None.
        gamma: (H,), any floating dtype; at least 0 with `is_need_exp`, from 0 to 1 without.
        is_need_exp: whether the decay is exp(-gamma).
        attn_method: one of LeetDecoding's names: "vanilla", "recursion", "block-based", "causal_dot_product",
            "causal_dot_product_torch", "lightningAttention2", "lightningAttention2_torch", "FleetAttention",
            "FleetAttention_torch"; the "_torch" twins are the same method, in the backend that serves the device. None
            lets leetdist choose.

    Returns:
        (B, H, N, dim) in q's dtype.

    Raises:
        ValueError: an argument is wrong; the message says which, what it is and what it must be.

    Source: LeetDecoding, arXiv 2501.02573, and the documentation of its package.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> gamma = torch.tensor([0.1, 0.5])
    >>> o = leetdist.causal_linear_decoder(q, k, v, is_mask_weight=True, gamma=gamma)
    >>> torch.equal(o, leetdist.linear_attention(q, k, v, -gamma))
    True
    """
    if attn_method is not None and attn_method not in METHOD_OF:
        raise ValueError(f"attn_method must be one of {', '.join(METHOD_OF)}, or None, got {attn_method!r}")
    log_decay = None
    if gamma is not None or is_mask_weight:
        check_qkv(q, k, v)
        log_decay = _log_decay(gamma, is_mask_weight, is_need_exp, q)
    method = "auto" if attn_method is None else METHOD_OF[attn_method]
    return linear_attention(q, k, v, log_decay, method=method)


# What a gamma became, and under which circumstances: checking its values stops the stream.
_known = WeakTensorKeyDictionary()


def _log_decay(gamma: Tensor | None, is_mask_weight: bool, is_need_exp: bool, q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if isinstance(gamma, Tensor) and gamma in _known and is_mask_weight:
        seen, log_decay = _known[gamma]
        if seen == (gamma._version, is_need_exp, dtype, q.shape[1]):
            return log_decay
    check_gamma(gamma, is_mask_weight, is_need_exp, q.shape[1])
    assert gamma is not None
    log_decay = -gamma.to(dtype) if is_need_exp else torch.log(gamma.to(dtype))
    log_decay = log_decay.clamp(min=LOWEST_LOG_DECAY)
    if not log_decay.requires_grad:
        _known[gamma] = (gamma._version, is_need_exp, dtype, q.shape[1]), log_decay
    return log_decay
