"""The two passes: what a tile does is the operator's (leetdist.operators), what travels between tiles and ranks is the
scan's (leetdist.engine.scan); here is the order of the two, lane by lane.

Inputs are in the operator's order: its `tokens`, then its `heads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from leetdist.engine import scan, trace
from leetdist.engine.filling import LaneStates, LaneTokens, in_order, kinds_of_tiles
from leetdist.engine.gradients import Gradients
from leetdist.engine.lanes import Lane
from leetdist.engine.layout import contiguous, row_major
from leetdist.engine.plan import Plan
from leetdist.engine.side import one_pass
from leetdist.kernels.runtime.recording import noting, refuse

Inputs: TypeAlias = tuple[Tensor, ...]


def forward_pass(
    inputs: Inputs, initial_state: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """With S the state at each tile's start (L what a tile adds to it):

        L = summaries      S = scan(L)      o = outputs(S)

    Returns o, the final state (if the problem asks for it) and S, all in one row of numbers (if any tile has one). The
    first two are no views: of one that a function of autograd's returns, PyTorch refuses to write over it.
    """
    o, final, states = cast(Any, _repeated(_forward_pass, (*inputs, initial_state), plan))
    if plan.problem.skipped:
        o = plan.operator.finished(o, _by_name(inputs, plan)).detach()
    return o, final, states


def _forward_pass(*given: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    inputs: Inputs
    *inputs, initial_state, plan = given  # type: ignore[assignment]
    operator, tiles, q, v = plan.operator, plan.tiles, inputs[0], inputs[2]
    beside = len(plan.lanes) > 1  # one lane's outputs wait for its scan anyway
    with one_pass(q, plan, "forward pass", beside=beside) as side:
        of_lane = {lane: _of_lane(inputs, lane, plan, backward=False) for lane in plan.lanes}
        states = LaneStates(q, plan)
        for lane in plan.lanes if plan.linked else ():
            with trace.span("tile states", plan.rank, lane, q):
                added = operator.summaries(
                    of_lane[lane], tiles, to_end=plan.to_end(reverse=False), out=states.place(lane)
                )
                states.put(lane, added)
            side.after(lane)
        initial = None
        if plan.any_initial:
            initial = scan.states_from_first(initial_state, plan.state_shape, states.like, plan)
        final = side.scan(states, initial, of_lane, plan, reverse=False)
        o = LaneTokens(q, q.dtype, plan, heads=plan.problem.heads, dim=v.shape[3])
        for lane in plan.lanes:
            side.join(lane, plan.rank, q)
            with trace.span("outputs", plan.rank, lane, q):
                own = o.place(lane)
                for tiles, (start,) in kinds_of_tiles(plan, lane, states):
                    own = operator.outputs(of_lane[lane], start, tiles, out=own)
                assert own is not None
                o.put(lane, own)
        whole = None
        if plan.problem.return_state:
            whole = scan.states_to_all(in_order(final, plan), plan.state_shape, plan)
    return o.whole.detach(), None if whole is None else whole.detach(), states.flat


def backward_pass(
    inputs: Inputs,
    flat_states: Tensor | None,
    do: Tensor | None,
    dfinal: Tensor | None,
    plan: Plan,
    *,
    needs_gate_grads: bool,
) -> tuple[Tensor | None, ...]:
    """With R the gradient of the state at each tile's end (U what a tile's outputs add to it):

        U = state_gradients(do)      R = scan(U), reversed      gradients of the inputs from S, R and do

    Some need no R (the operator's `early` ones): they are computed while R's scan is under way. Returns the gradients
    of the inputs (None for those beside q, k and v unless needs_gate_grads), and of the initial state (on the first
    rank, if the call has one).
    """
    if needs_gate_grads:  # which the plan of a compiled call does not know
        plan = plan.learning
    found = gradients_by_token(inputs, flat_states, do, dfinal, plan, needs_gate_grads=needs_gate_grads)
    if not (needs_gate_grads and plan.operator.by_token):
        return found
    *grads, dinitial = found
    for name in plan.operator.by_token:
        place = len(plan.operator.tokens) + plan.operator.heads.index(name)
        grads[place] = added_over_tokens(cast(Tensor, grads[place]))
    return *grads, dinitial


def gradients_by_token(
    inputs: Inputs,
    flat_states: Tensor | None,
    do: Tensor | None,
    dfinal: Tensor | None,
    plan: Plan,
    *,
    needs_gate_grads: bool,
) -> tuple[Tensor | None, ...]:
    """As `backward_pass`, but what comes token by token (`Operator.by_token`) is still to be `added_over_tokens`."""
    do, dfinal = (None if x is None else row_major(x) for x in (do, dfinal))  # repeated passes look at memory alone
    return _repeated(_backward_pass, (*inputs, flat_states, do, dfinal), plan, needs_gate_grads)


def added_over_tokens(grad: Tensor) -> Tensor:
    """(B, H, N) to (H,): this rank's share."""
    return grad.sum((0, 2))


def _backward_pass(*given: Any) -> tuple[Tensor | None, ...]:
    inputs: Inputs
    *inputs, flat_states, do, dfinal, plan, needs_gate_grads = given  # type: ignore[assignment]
    problem, operator, tiles, q = plan.problem, plan.operator, plan.tiles, inputs[0]
    if do is None:
        do = q.new_zeros(q.shape[0], problem.heads, q.shape[2], problem.dv)
    do = row_major(do)
    if dfinal is not None:
        dfinal = contiguous(dfinal, dfinal.dtype)
    with one_pass(q, plan, "backward pass", beside=True) as side:
        of_lane = {lane: _of_lane(inputs, lane, plan, backward=True) for lane in plan.lanes}
        do_of = {lane: lane.part(do, 1) for lane in plan.lanes}
        states, ends = LaneStates(q, plan, flat_states), LaneStates(q, plan)
        for lane in plan.lanes if plan.linked else ():
            with trace.span("tile states", plan.rank, lane, q):
                added = operator.state_gradients(
                    of_lane[lane], states[lane], do_of[lane], tiles,
                    to_end=plan.to_end(reverse=True), out=ends.place(lane),
                )  # fmt: skip
                ends.put(lane, added)
            side.after(lane)
        if problem.return_state and (dfinal is not None or plan.transport is not None):
            if dfinal is None:
                dfinal = ends.like.new_zeros(plan.state_shape)
            dfinal = scan.states_from_all(dfinal, plan)
        dinitial = side.scan(ends, dfinal, of_lane, plan, reverse=True)

        grads = Gradients(inputs, ends.like.dtype, plan, needs_gate_grads=needs_gate_grads)
        for lane in plan.lanes if operator.early else ():
            grads.add_early(lane, of_lane[lane], do_of[lane], states)
        for lane in plan.lanes:
            side.join(lane, plan.rank, q)
            grads.add_late(lane, of_lane[lane], do_of[lane], states, ends)
        of_heads = grads.of_heads(of_lane, do_of, states, ends)
        dinitial_whole = None
        if plan.any_initial:
            dinitial_whole = scan.states_to_first(in_order(dinitial, plan), plan.state_shape, plan)
    return *grads.of_tokens(), *of_heads, dinitial_whole if problem.has_initial else None


def _of_lane(inputs: Inputs, lane: Lane, plan: Plan, *, backward: bool) -> Mapping[str, Tensor]:
    """The lane's heads of the operator's inputs, by name."""
    heads = plan.operator.heads
    own = {name: lane.part(x, 0 if name in heads else 1) for name, x in _by_name(inputs, plan).items()}
    return plan.operator.prepared(own, backward=backward)


def _by_name(inputs: Inputs, plan: Plan) -> dict[str, Tensor]:
    return dict(zip((*plan.operator.tokens, *plan.operator.heads), inputs, strict=True))


def _repeated(
    function: Any, tensors: tuple[Tensor | None, ...], plan: Plan, needs_gate_grads: bool | None = None
) -> tuple[Tensor | None, ...]:
    """One pass; where it has been seen before, and is nothing but launches, its launches again."""
    more = (plan,) if needs_gate_grads is None else (plan, needs_gate_grads)
    repeated = repeater()
    if not plan.repeatable or trace.on() or repeated is None:
        refuse()
        return cast(Any, function(*tensors, *more))
    if noting():  # of the whole call (leetdist.engine.repeats)
        return cast(Any, function(*tensors, *more))
    if plan.transport is None:
        return cast(Any, repeated(function, tensors, *more))
    place = plan.transport.place()
    if place is None:
        return cast(Any, function(*tensors, *more))
    # Which steps of the host name, and come back to. (torch.cuda.stream takes longer than a launch.)
    stream = torch._C._cuda_getCurrentStream(plan.problem.device.index)
    phase = "forward pass" if needs_gate_grads is None else "backward pass"
    with plan.transport.call(phase):
        try:
            return cast(Any, repeated(function, tensors, *more, where=(stream, place)))
        except BaseException:
            torch._C._cuda_setStream(*stream)
            raise


@cache
def repeater() -> Any:
    """What repeats launches (leetdist.kernels.runtime.replay); None where there is no Triton."""
    try:
        from leetdist.kernels.runtime.replay import repeated
    except ImportError:
        return None
    return repeated
