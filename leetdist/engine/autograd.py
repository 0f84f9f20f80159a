"""The two passes as one differentiable function, for eager calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leetdist.engine.passes import backward_pass, forward_pass, row_major
from leetdist.engine.plan import Plan


class LinearAttention(torch.autograd.Function):
    """`o, final_state = LinearAttention.apply(q, k, v, log_decay, initial_state, anchor, plan)`.

    Saved between the passes: the inputs and S, one Dk x Dv state a tile. anchor: anything that requires grad where
    another rank's tensors do, so that this rank's backward runs too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        anchor: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (row_major(x) for x in (q, k, v))
        o, final, states = forward_pass(q, k, v, log_decay, initial_state, plan)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, log_decay, states)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        needed = plan.problem.needs_decay_grad
        q, k, v, log_decay, states = ctx.saved_tensors
        grads = backward_pass(q, k, v, log_decay, states, do, dfinal, plan, needs_decay_grad=needed)
        return *grads, None, None
