"""What PyTorch's transforms make of the custom ops: reverse and forward mode, torch.func's levels, vmap."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, library
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from leetdist.arguments import IN_MEMORY, transformed
from leetdist.engine.autograd import ONCE

# Of an op's arguments, as leetdist.engine.ops.Call has them: tensors first, then options.
TENSORS, ARGUMENTS = 6, 15
DECAY, DOCUMENTS = 3, 5
NO_FORWARD_MODE = (
    "leetdist: forward-mode differentiation (jvp, jacfwd) of linear_attention goes by q, k, v and initial_state, not "
    "by log_decay, nor through its backward pass. On one device, method='vanilla' and method='recursion' can do both"
)


def followed() -> bool:
    """Whether something of PyTorch's follows operations: a compiler, torch.func, forward mode, or a dispatch mode."""
    return torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack() > 0


class _Forward(_SingleLevelFunction):
    """The forward op, differentiable: `_Forward.apply(op, its backward op, *arguments)`."""

    @staticmethod
    def forward(ctx: Any, op: Any, backward_op: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        o, final, states = _below_autograd(op, args)
        ctx.op, ctx.backward_op, ctx.options = op, backward_op, args[TENSORS:ARGUMENTS]
        ctx.save_for_backward(*args[:TENSORS], states)
        ctx.save_for_forward(*args[:TENSORS], states)
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        return o, final, states

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        needs_decay_grad, needs_initial_grad = ctx.needs_input_grad[5:7]
        *tensors, states = ctx.saved_tensors
        dq, dk, dv, ddecay, dinitial = ctx.backward_op(*tensors, *ctx.options, states, do, dfinal, needs_decay_grad)
        return (
            None, None, dq, dk, dv, ddecay if needs_decay_grad else None, dinitial if needs_initial_grad else None,
            *[None] * (len(ctx.needs_input_grad) - 7),
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Any) -> tuple[Tensor, Tensor, None]:
        """o and the state are linear in q, in v, and in (k, initial_state)."""
        tq, tk, tv, tdecay, tinitial = tangents[:5]
        q, k, v, decay, initial, documents, _states = ctx.saved_tensors
        if tdecay is not None:
            raise RuntimeError(NO_FORWARD_MODE)
        parts = []
        if tq is not None:
            o, state, _ = ctx.op(tq, k, v, decay, initial, documents, *ctx.options)
            parts.append((o, torch.zeros_like(state)))
        if tv is not None:
            parts.append(ctx.op(q, k, tv, decay, None, documents, *ctx.options)[:2])
        if tk is not None or tinitial is not None:
            tk = torch.zeros_like(k) if tk is None else tk
            parts.append(ctx.op(q, tk, v, decay, tinitial, documents, *ctx.options)[:2])
        outputs, states = zip(*parts, strict=True)
        return sum(outputs[1:], outputs[0]), sum(states[1:], states[0]), None


class _Backward(_SingleLevelFunction):
    """The backward op, which has no derivative, and says so."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = _below_autograd(op, args)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(NO_FORWARD_MODE)


def _below_autograd(op: Any, args: tuple[Any, ...]) -> Any:
    """The op at the next level down: another of torch.func's, which differentiates by itself, or the kernels."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class _Fold:
    """`size` calls side by side as one: a larger batch, which changes no bit, or, where each has decays of its own or
    documents are packed in one row, more heads."""

    def __init__(self, size: int, dims: tuple[int | None, ...], args: tuple[Any, ...], heads: bool = False) -> None:
        self.size = size
        if dims[DOCUMENTS] is not None:
            raise RuntimeError("leetdist: vmap over cu_seqlens is not possible: all calls have the same documents")
        constant = args[DECAY] is not None and args[DECAY].ndim - (dims[DECAY] is not None) == 1
        self.into_heads = (constant and (heads or dims[DECAY] is not None)) or args[DOCUMENTS] is not None
        q, k, v, log_decay, initial_state = (
            None if x is None or (i == DECAY and constant) else self.together(x, dims[i])
            for i, x in enumerate(args[:DOCUMENTS])
        )
        if constant:
            log_decay = self._first(args[DECAY], dims[DECAY]).flatten() if self.into_heads else args[DECAY]
        self.call = (q, k, v, log_decay, initial_state, *args[DOCUMENTS:ARGUMENTS])

    def _first(self, x: Tensor, dim: int | None) -> Tensor:
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def together(self, x: Tensor, dim: int | None) -> Tensor:
        """(B, H, ...) of each call, mapped along `dim`, in one tensor."""
        x = self._first(x, dim)
        return x.movedim(0, 1).flatten(1, 2) if self.into_heads else x.flatten(0, 1)

    def apart(self, x: Tensor) -> Tensor:
        """The inverse, mapped along dimension 0; a tensor that stands for nothing stays empty."""
        if x.ndim == 1 and not x.numel():
            return x.expand(self.size, 0)
        return x.unflatten(1, (self.size, -1)).movedim(1, 0) if self.into_heads else x.unflatten(0, (self.size, -1))


def _map_forward(op: Any) -> Callable[..., Any]:
    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        fold = _Fold(info.batch_size, dims, args)
        o, final, states = op(*fold.call)
        return (fold.apart(o), fold.apart(final), states), (0, 0, None)

    return rule


def _map_backward(op: Any, forward_op: Any) -> Callable[..., Any]:
    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        states, do, dfinal, needs_decay_grad = args[ARGUMENTS : ARGUMENTS + 4]
        saved = _Fold(info.batch_size, dims, args)
        fold = _Fold(info.batch_size, dims, args, heads=needs_decay_grad)  # each call's gradient by itself
        if fold.into_heads != saved.into_heads or all(dim is None for dim in dims[:TENSORS]):
            states = forward_op(*fold.call)[2]  # those that were saved are of other calls, or of only one
        do, dfinal = (
            None if x is None else fold.together(x, dim)
            for x, dim in zip((do, dfinal), dims[ARGUMENTS + 1 : ARGUMENTS + 3], strict=True)
        )
        dq, dk, dv, ddecay, dinitial = op(*fold.call, states, do, dfinal, needs_decay_grad)
        if needs_decay_grad and ddecay.ndim == 1:
            ddecay = ddecay.unflatten(0, (fold.size, -1))
        else:
            ddecay = fold.apart(ddecay)
        return (*(fold.apart(x) for x in (dq, dk, dv)), ddecay, fold.apart(dinitial)), (0, 0, 0, 0, 0)

    return rule


class _InOrder:
    """A function of autograd's for an op whose calls keep their order in a graph: each takes one of the outputs of the
    call before it in the same graph."""

    def __init__(self, apply: Callable[..., Any], arguments: int, output: int, *, saved: bool) -> None:
        self.apply, self.arguments, self.output, self.saved = apply, arguments, output, saved

    def __call__(self, *args: Any) -> Any:
        mode = get_proxy_mode()
        if mode is None or torch._C._functorch.peek_interpreter_stack() is not None:
            return self.apply(*args)
        last: dict[_InOrder, Tensor] = vars(mode.tracer).setdefault("_leetdist_last", {})
        nodes = mode.tracer.graph.nodes
        before = len(nodes)
        results = self.apply(*args[: self.arguments], last.get(self))
        last[self] = results[self.output]
        if self.saved:
            # Also in a checkpointed region: a call that was made again in the backward would have no place in the
            # order there.
            for node in islice(reversed(nodes), len(nodes) - before):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return results


def _only_numbers(args: tuple[Any, ...]) -> bool:
    """Whether all that a call of an op asks for is numbers, as a compiled graph does: no derivative, and nobody follows
    it. Then the dispatcher need not be asked again, nor autograd, which takes longer than the launches of a call."""
    if (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or followed():
        return False
    for x in args:
        kind = type(x)
        if kind not in _PLAIN and issubclass(kind, Tensor) and (kind not in IN_MEMORY or x.is_meta):
            return False
    return True


_PLAIN = frozenset((type(None), float, bool, str, int))


def register(
    ops_library: library.Library,
    forward: Any,
    backward: Any,
    runs: tuple[Callable[..., Any], Callable[..., Any]],
    *,
    in_order: bool,
) -> None:
    """Make a pair of ops differentiable and mappable. runs: what computes them; in_order: calls keep their order in
    compiled graphs."""

    def differentiated(function: type[_SingleLevelFunction], *ops: Any) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            # A function of one level, as torch.autograd.Function would start torch.func's levels anew: this is one of
            # them, which has come to the op.
            with enable_single_level_autograd_function():
                return function.apply(*ops, *args)  # type: ignore[attr-defined]

        return kernel

    def quick(run: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: run(*args) if _only_numbers(args) else kernel(*args)

    forward_kernel = differentiated(_Forward, forward, backward)
    backward_kernel = differentiated(_Backward, backward)
    if in_order:  # what the next call takes is small: a view of the states, the gradient of log_decay
        forward_kernel = _InOrder(forward_kernel, ARGUMENTS, 2, saved=True)
        backward_kernel = _InOrder(backward_kernel, ARGUMENTS + 4, 3, saved=False)
    forward_kernel, backward_kernel = quick(runs[0], forward_kernel), quick(runs[1], backward_kernel)
    name, name_of_backward = (op.name().partition("::")[2] for op in (forward, backward))
    ops_library.impl(name, forward_kernel, "Autograd")
    ops_library.impl(name_of_backward, backward_kernel, "Autograd")
    library.register_vmap(f"leetdist::{name}", _map_forward(forward), lib=ops_library)
    library.register_vmap(f"leetdist::{name_of_backward}", _map_backward(backward, forward), lib=ops_library)
