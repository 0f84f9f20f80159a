"""Derivatives that do not exist here, such as second ones: a call that is asked for one says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from leetdist.arguments import transformed

Gradients: TypeAlias = "tuple[Tensor | None, ...]"

NO_LEGACY_VMAP = (
    "leetdist: is_grads_batched=True and torch.autograd.functional's vectorize=True map a backward pass in a way that "
    "no function of one's own can serve; torch.func.vmap, jacrev and jacfwd work"
)


def check_not_mapped(*incoming: Tensor | None) -> None:
    """Of the gradients that come into a backward pass."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in incoming):
        raise RuntimeError(NO_LEGACY_VMAP)


def mapped() -> bool:
    """Whether torch.func.vmap may map the backward pass that runs now. (While torch.compile traces, Dynamo's.)"""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def one_by_one(function: Any, info: Any, dims: tuple[Any, ...], what: Any, *tensors: Tensor | None) -> tuple[Any, Any]:
    """The rule for vmap of a torch.autograd.Function of `what`, no tensor, and tensors: each has the bits of a call of
    its own, and kernels see memory."""
    each = [
        [x if dim is None or x is None else x.select(dim, i) for x, dim in zip(tensors, dims[1:], strict=True)]
        for i in range(info.batch_size)
    ]
    found = [function.apply(what, *one) for one in each]
    results = tuple(None if x[0] is None else torch.stack(x) for x in zip(*found, strict=True))
    return results, tuple(None if x is None else 0 for x in results)


def check_not_transformed(call: str, *tensors: Tensor) -> None:
    """Of a call that autograd alone differentiates."""
    if not transformed():
        return
    if torch._C._are_functorch_transforms_active() or any(unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"leetdist: {call} is differentiated by autograd only: torch.func's transforms, and forward mode, have no "
            "rules for it. They have for linear_attention, and on one device for mamba_chunk_scan_combined and "
            "causal_conv1d"
        )


def differentiated_once(name: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the `backward` of a torch.autograd.Function that is part of `name`: whatever asks for a derivative of its
    gradients, by what it saved or by what comes in, raises.

    PyTorch's own `once_differentiable` raises only where everything is differentiated. With the gradient by one tensor,
    `torch.autograd.grad(loss + penalty, x)` finds no way from the penalty to x, and drops it without a word.
    """

    def decorated(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def checked(ctx: Any, *incoming: Tensor | None) -> Gradients:
            check_not_mapped(*incoming)
            with torch.no_grad():
                if mapped():
                    grads = _Mapped.apply(partial(backward, ctx), *incoming)
                else:
                    grads = backward(ctx, *incoming)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # whose backward has no second one
                return grads
            by = [x for x in (*ctx.saved_tensors, *incoming) if x is not None and x.requires_grad]
            return _Once.apply(name, len(grads), *grads, *by) if by else grads

        return checked

    return decorated


class _Mapped(torch.autograd.Function):
    """A backward pass of incoming gradients, which vmap takes one by one."""

    @staticmethod
    def forward(backward: Callable[..., Gradients], *incoming: Tensor | None) -> Gradients:
        return backward(*incoming)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
        return one_by_one(_Mapped, info, dims, *given)


class _Once(torch.autograd.Function):
    """The first `count` tensors as they are, as functions of the others, whose derivative there is none of."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor | None) -> Gradients:
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], name: str, count: int, *tensors: Tensor | None) -> tuple[Any, Any]:
        return _Once.apply(name, count, *tensors), dims[2 : 2 + count]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"leetdist: {ctx.name} can be differentiated once: its backward pass has no derivative (gradient "
            "penalties, hessians and hvp need one)"
        )
