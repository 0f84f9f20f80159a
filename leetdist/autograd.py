"""The operator as one autograd function: local kernels, the scan between them, and the exact backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leetdist.plan import Plan
from leetdist.sequence import scan


class LinearAttention(torch.autograd.Function):
    """`o, final_state = LinearAttention.apply(q, k, v, log_decay, initial_state, plan)`.

    Forward, with S the state at each tile's start (L what a tile adds to it):

        L = tile_states(k, v)      S = scan(L)      o = LA(q, k, v; S)

    Backward, with R the gradient of the state at each tile's end:

        U = tile_states(q, do), reversed      R = scan(U), reversed
        dq = LA(do, v, k; S^T)      dk = LA(v, do, q; R^T), reversed      dv = LA(k, q, do; R), reversed

    Saved between them: the inputs and S, one Dk x Dv state a tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:
        problem, kernels, tiles = plan.problem, plan.kernels, plan.tiles
        q, k, v = (_row_major(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            states = kernels.tile_states(k, v, log_decay, tiles, reverse=False)
            initial = None
            if plan.any_initial:
                initial = scan.states_from_first(initial_state, plan.state_shape, states, plan)
            final = scan.scan(states, initial, log_decay, plan, reverse=False)
            if problem.return_state:
                final = scan.states_to_all(final, plan.state_shape, plan)
            o = kernels.tile_outputs(
                q, k, v, states, log_decay, tiles,
                reverse=False, scale=problem.scale, state_scale=problem.scale, out_dtype=q.dtype,
            )  # fmt: skip
        if plan.transport is not None:
            plan.transport.flush()
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, log_decay, states)
        ctx.set_materialize_grads(False)
        return o, final if problem.return_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, states = ctx.saved_tensors
        plan: Plan = ctx.plan
        problem, kernels, tiles = plan.problem, plan.kernels, plan.tiles
        scale = problem.scale
        if do is None:
            do = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], problem.dv)
        do = _row_major(do)
        with torch.autocast(q.device.type, enabled=False):
            grads = kernels.tile_states(q, do, log_decay, tiles, reverse=True, scale=scale)
            if problem.return_state and (dfinal is not None or plan.transport is not None):
                if dfinal is None:
                    dfinal = states.new_zeros(plan.state_shape)
                dfinal = scan.states_from_all(dfinal, plan)
            dinitial: Tensor | None = scan.scan(grads, dfinal, log_decay, plan, reverse=True)
            if plan.any_initial:
                assert dinitial is not None
                dinitial = scan.states_to_first(dinitial, plan.state_shape, plan)

            # Heads that share k and v add up, in fp32, in the order of the heads.
            wide = states.dtype if problem.kv_heads < problem.heads else q.dtype
            common = {"log_decay": log_decay, "tiles": tiles, "scale": scale}
            dq = kernels.tile_outputs(
                do, v, k, states.mT, reverse=False, state_scale=scale, out_dtype=q.dtype, **common
            )
            dk = kernels.tile_outputs(v, do, q, grads.mT, reverse=True, state_scale=1.0, out_dtype=wide, **common)
            dv = kernels.tile_outputs(k, q, do, grads, reverse=True, state_scale=1.0, out_dtype=wide, **common)
            dk, dv = (_sum_shared(x, problem.kv_heads).to(q.dtype) for x in (dk, dv))

            dlog_decay = None
            if problem.needs_decay_grad:
                shares = kernels.decay_gradient(q, k, v, do, states, grads, log_decay, tiles, scale=scale)
                dlog_decay = scan.decay_gradient_to_first(shares, log_decay, plan)
        if plan.transport is not None:
            plan.transport.flush()
        given = plan.problem.has_initial
        return dq, dk, dv, dlog_decay, dinitial if given else None, None


def _row_major(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; any other strides are served as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _sum_shared(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, N, D) summed over the heads that share one head of k and v: (B, kv_heads, N, D)."""
    if x.shape[1] == kv_heads:
        return x
    shared = x.unflatten(1, (kv_heads, -1)).unbind(2)
    total = shared[0]
    for x in shared[1:]:
        total = total + x
    return total
