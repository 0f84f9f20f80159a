"""Elementwise functions whose bits depend on the number alone, not on where in a tensor it lies.

A CPU takes most numbers in vectors and the rest one by one. PyTorch's exp, log1p and arithmetic give the same bits both
ways; its sigmoid, SiLU and softplus do not (one number in 25), so that a shard would not have the bits of the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# From here on softplus(x) is x, in fp64 too; and exp of it is far from overflow.
LINEAR = 40.0
# Below, e^x is as good as 0, and the squares of e^-x, which gradients take, overflow in fp32.
LEAST = -85.0


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x); differentiable, as all of these."""
    return 1 / (1 + torch.exp(-x.clamp_min(LEAST))) if by_parts(x) else torch.sigmoid(x)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x / (1 + torch.exp(-x.clamp_min(LEAST))) if by_parts(x) else F.silu(x)


def silu_(x: Tensor) -> Tensor:
    """`silu`, written over x: its bits with half the memory, and without a gradient."""
    if not by_parts(x):
        return F.silu(x, inplace=True)
    return x.div_(x.clamp_min(LEAST).neg_().exp_().add_(1))


def silu_gradient(x: Tensor) -> Tensor:
    """The derivative of `silu` at x."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    if not by_parts(x):
        return F.softplus(x, threshold=LINEAR)
    return torch.where(x > LINEAR, x, torch.log1p(torch.exp(x.clamp_max(LINEAR))))


def by_parts(x: Tensor) -> bool:
    """Whether operations are PyTorch's own on a CPU: not where torch.compile makes kernels of them."""
    return x.is_cpu and not torch.compiler.is_compiling()
