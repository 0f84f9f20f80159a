"""The two passes as one function of autograd's. `leetdist.engine.ops` has them as custom ops, for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leetdist.engine.passes import backward_pass, forward_pass
from leetdist.engine.plan import Plan


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
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        *inputs, states = ctx.saved_tensors
        *grads, dinitial = backward_pass(
            tuple(inputs), states, do, dfinal, plan, needs_head_grads=plan.problem.needs_decay_grad
        )
        return dinitial, None, None, *grads
