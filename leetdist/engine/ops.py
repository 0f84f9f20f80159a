"""The operator's two passes as custom ops, so that torch.compile takes a sharded call into its graph without a break.

An op knows its group by name and finds the transport when it runs; what the ranks must agree on is checked then, in the
forward and again in the backward op. The values of a log_decay on a GPU are not read here, because that would stop the
stream: they are taken as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, library

from leetdist.engine.inputs import canonical_tensors, state_dtype
from leetdist.engine.layout import empty_as, row_major
from leetdist.engine.passes import backward_pass, forward_pass
from leetdist.engine.plan import Plan, plan_call
from leetdist.sequence.group import by_name
from leetdist.sequence.shard import move


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    method: str,
    tile: int | None,
    precision: str | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    """As leetdist.linear_attention, with the group by name; the state is empty where it is not asked for."""
    o, state, _ = _forward(
        q, k, v, log_decay, initial_state, cu_seqlens, float(scale), return_state, method, tile, precision, group
    )
    return o, state


@library.custom_op("leetdist::forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_state: bool,
    method: str,
    tile: int | None,
    precision: str | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(q, k, v, log_decay, initial_state, cu_seqlens, scale, return_state, method, tile, precision, group)
    like, given = q, initial_state
    q, k, v, decay, initial_state = canonical_tensors(q, k, v, log_decay, initial_state, cu_seqlens, plan)
    q, k, v = (_aligned(x, plan) for x in (q, k, v))
    o, final, states = forward_pass((q, k, v, decay), initial_state, plan)
    o = _aligned(o, plan, back=True)
    if final is None:
        final = states.new_empty(0)
    elif given is not None and final.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        final = final.clone()
    # The number of tiles is not known when a graph is traced: it depends on the other ranks' tokens. A view of one
    # element has a size that is, and holds all the memory; the backward op takes the whole again.
    states = states[:1] if states.numel() else states.new_zeros(1)
    return _laid_out(o, like), final, states


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_state: bool,
    method: str,
    tile: int | None,
    precision: str | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, dk = q.shape
    dv, dtype = v.shape[3], state_dtype(q.dtype)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty((rows, heads, dk, dv) if return_state else (0,), dtype=dtype)
    return empty_as(q, heads, dv, q.dtype), final, q.new_empty(1, dtype=dtype)


@library.custom_op("leetdist::backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    do: Tensor,
    dfinal: Tensor,
    scale: float,
    return_state: bool,
    method: str,
    tile: int | None,
    precision: str | None,
    group: str,
    needs_decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(q, k, v, log_decay, initial_state, cu_seqlens, scale, return_state, method, tile, precision, group)
    count = q.shape[0] * q.shape[1] * plan.tiles.count * q.shape[3] * v.shape[3]
    if states.untyped_storage().nbytes() < count * states.element_size():
        raise RuntimeError(
            "leetdist: what the forward op saved for the backward was copied in between, and only one element came "
            "along: hooks that move saved tensors (torch.autograd.graph.save_on_cpu) do not work on compiled calls"
        )
    states = states.as_strided((count,), (1,)) if count else states[:0]
    like_q, like_k, like_v, of_decay = q, k, v, _decay_dtype(log_decay)
    q, k, v, decay, _ = canonical_tensors(q, k, v, log_decay, None, cu_seqlens, plan)
    q, k, v, do = (_aligned(x, plan) for x in (q, k, v, row_major(do)))
    dq, dk, dv, ddecay, dinitial = cast(Any, backward_pass)(
        (q, k, v, decay), states, do, dfinal if return_state else None, plan, needs_head_grads=needs_decay_grad
    )
    return (
        _laid_out(_aligned(dq, plan, back=True), like_q),
        _laid_out(_aligned(dk, plan, back=True), like_k),
        _laid_out(_aligned(dv, plan, back=True), like_v),
        states.new_empty(0, dtype=of_decay) if ddecay is None else ddecay.to(of_decay),
        states.new_empty(0) if dinitial is None else dinitial,
    )


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    do: Tensor,
    dfinal: Tensor,
    scale: float,
    return_state: bool,
    method: str,
    tile: int | None,
    precision: str | None,
    group: str,
    needs_decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_as(q, q.shape[1], q.shape[3], q.dtype),
        empty_as(k, k.shape[1], k.shape[3], k.dtype),
        empty_as(v, v.shape[1], v.shape[3], v.dtype),
        q.new_empty(q.shape[1] if needs_decay_grad else 0, dtype=_decay_dtype(log_decay)),
        q.new_empty(0, dtype=state_dtype(q.dtype))
        if initial_state is None
        else initial_state.new_empty(initial_state.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens, output[2])


def _differentiate(ctx: Any, do: Tensor, dfinal: Tensor, _: Any) -> tuple[Any, ...]:
    needs_decay_grad, needs_initial_grad = ctx.needs_input_grad[3:5]
    dq, dk, dv, ddecay, dinitial = _backward(*ctx.saved_tensors, do, dfinal, *ctx.options, needs_decay_grad)
    return (
        dq, dk, dv, ddecay if needs_decay_grad else None, dinitial if needs_initial_grad else None,
        *(None for _ in range(1 + len(ctx.options))),
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_save)


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_state: bool,
    method: str,
    tile: int | None,
    precision: str | None,
    group: str,
) -> Plan:
    return plan_call(
        q, k, v, log_decay,
        scale=scale, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens, method=method,
        tile=tile, precision=precision, transport=by_name(group), read_values=not q.is_cuda,
    )  # fmt: skip


def _decay_dtype(log_decay: Tensor | None) -> torch.dtype:
    return torch.float32 if log_decay is None else log_decay.dtype


def _aligned(x: Tensor, plan: Plan, *, back: bool = False) -> Tensor:
    """x as the grid wants it, from the shards that the caller has, or back."""
    if plan.transport is None:
        return x
    old, new = plan.given, plan.layout.lengths
    return move(x, 2, *((new, old) if back else (old, new)), plan.transport)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides that the op's fake promises."""
    promised = empty_as(like, x.shape[1], x.shape[3], x.dtype)
    return x if x.stride() == promised.stride() else promised.copy_(x)
