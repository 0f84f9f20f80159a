"""LeetDecoding's own entry point, on leetdist's kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leetdist.api import linear_attention
from leetdist.engine import ops
from leetdist.engine.checks import check_gamma, check_qkv
from leetdist.engine.values import remember, values_of
from leetdist.operators.problem import state_dtype

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
        is_mask_weight: whether there is a decay; without one `gamma` must be None.
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
    if attn_method is not None and (not isinstance(attn_method, str) or attn_method not in METHOD_OF):
        raise ValueError(f"attn_method must be one of {', '.join(METHOD_OF)}, or None, got {attn_method!r}")
    check_qkv(q, k, v)
    check_gamma(gamma, is_mask_weight, is_need_exp, q)
    log_decay = None if gamma is None else _log_decay(gamma, is_need_exp, q)
    method = "auto" if attn_method is None else METHOD_OF[attn_method]
    return linear_attention(q, k, v, log_decay, method=method)


def _log_decay(gamma: Tensor, is_need_exp: bool, q: Tensor) -> Tensor:
    """The natural log of the decay: computed in every call, for a gamma may have changed."""
    dtype = state_dtype(q.dtype)
    log_decay = -gamma.to(dtype) if is_need_exp else torch.log(gamma.to(dtype))
    log_decay = log_decay.clamp(min=LOWEST_LOG_DECAY)
    if ops.wanted(q):
        return log_decay
    values = values_of(gamma)
    if values is not None:
        _check_values(values, is_need_exp)
        if gamma.device.type != "cpu":  # so that the GPU's stream is not stopped once more
            logs = [-x if is_need_exp else math.log(x) if x else LOWEST_LOG_DECAY for x in values]
            remember(log_decay, tuple(max(x, LOWEST_LOG_DECAY) for x in logs))
    return log_decay


def _check_values(values: tuple[float, ...], is_need_exp: bool) -> None:
    for value in values:
        if not value >= 0 or (value > 1 and not is_need_exp):
            wanted = "at least 0, so that exp(-gamma) decays" if is_need_exp else "from 0 to 1"
            raise ValueError(f"gamma must be {wanted} (is_need_exp={is_need_exp}), got {value}")
