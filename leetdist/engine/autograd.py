"""The two passes as one function of autograd's. `leetdist.engine.ops` has them as custom ops, for all of PyTorch that
follows operations: torch.compile, torch.func, forward mode, fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leetdist.engine.passes import backward_pass, forward_pass
from leetdist.engine.plan import Plan
from leetdist.sequence.once import check_not_mapped, mapped, one_by_one

ONCE = (
    "leetdist: linear_attention can be differentiated once: its backward pass has no derivative (gradient penalties, "
    "hessians and hvp need one). On one device, method='vanilla' and method='recursion' can be differentiated twice"
)


class LinearAttention(torch.autograd.Function):
    """`o, final_state = LinearAttention.apply(initial_state, anchor, plan, *inputs)`, inputs in the operator's order.

    Tensors are canonical (leetdist.engine.inputs). Saved between the passes: they, and S, one Dk x Dv state a tile.
    anchor: anything that requires grad where another rank's tensors do, so that this rank's backward runs too.
    """

    @staticmethod
    def forward(
        ctx: Any, initial_state: Tensor | None, anchor: Tensor | None, plan: Plan, *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        o, final, states = forward_pass(inputs, initial_state, plan)
        ctx.plan = plan
        ctx.save_for_backward(*inputs, states)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        check_not_mapped(do, dfinal)
        # Under create_graph, or mapped (is_grads_batched), PyTorch has to see what can and cannot be done with it.
        seen = torch.is_grad_enabled() or mapped()
        gradients = BackwardPass.apply if seen else _gradients
        *grads, dinitial = gradients(ctx.plan, do, dfinal, *ctx.saved_tensors)
        return dinitial, None, None, *grads


def _gradients(plan: Plan, do: Tensor | None, dfinal: Tensor | None, *saved: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, states = saved
    return backward_pass(tuple(inputs), states, do, dfinal, plan, needs_gate_grads=plan.problem.needs_decay_grad)


class BackwardPass(torch.autograd.Function):
    """The backward pass as a function of its own. It has no derivative, and is there to say so: autograd would take a
    pass that it does not see for a constant, and second derivatives for zeros."""

    @staticmethod
    def forward(plan: Plan, do: Tensor | None, dfinal: Tensor | None, *saved: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(plan, do, dfinal, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(ONCE)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
        return one_by_one(BackwardPass, info, dims, *given)
