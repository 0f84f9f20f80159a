"""Backward passes without a derivative, which say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = "tuple[Tensor | None, ...]"


def differentiated_once(name: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the `backward` of a torch.autograd.Function that is part of `name`: whatever asks for a derivative of its
    gradients, by what it saved or by what comes in, raises.

    PyTorch's own `once_differentiable` raises only where everything is differentiated. With the gradient by one tensor,
    `torch.autograd.grad(loss + penalty, x)` finds no way from the penalty to x, and drops it without a word.
    """

    def decorated(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def checked(ctx: Any, *incoming: Tensor | None) -> Gradients:
            with torch.no_grad():
                grads = backward(ctx, *incoming)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # whose backward has no second one
                return grads
            by = [x for x in (*ctx.saved_tensors, *incoming) if x is not None and x.requires_grad]
            return _Once.apply(name, len(grads), *grads, *by) if by else grads

        return checked

    return decorated


class _Once(torch.autograd.Function):
    """The first `count` tensors as they are, as functions of the others, whose derivative there is none of."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> Gradients:
        ctx.name = name
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"leetdist: {ctx.name} can be differentiated once: its backward pass has no derivative (gradient "
            "penalties, hessians and hvp need one)"
        )
