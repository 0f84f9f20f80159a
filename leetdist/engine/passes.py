"""The two passes: what a tile does is the operator's (leetdist.operators), what travels between tiles and ranks is the
scan's (leetdist.engine.scan); here is the order of the two, lane by lane.

Inputs are in the operator's order: its `tokens`, then its `heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from leetdist.engine import scan, trace
from leetdist.engine.filling import LaneStates, LaneTokens, in_order
from leetdist.engine.lanes import Lane, index_of
from leetdist.engine.layout import contiguous, row_major
from leetdist.engine.plan import Plan
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.runtime import recording
from leetdist.kernels.runtime.recording import noting, refuse

Inputs: TypeAlias = tuple[Tensor, ...]


def forward_pass(
    inputs: Inputs, initial_state: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """With S the state at each tile's start (L what a tile adds to it):

        L = summaries      S = scan(L)      o = outputs(S)

    Returns o, the final state (if the problem asks for it) and S, all in one row of numbers (if any tile has one).
    """
    o, final, states = cast(Any, _repeated(_forward_pass, (*inputs, initial_state), plan))
    if plan.problem.skipped:
        o = plan.operator.finished(o, _by_name(inputs, plan))
    return o, final, states


def _forward_pass(*given: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    inputs: Inputs
    *inputs, initial_state, plan = given  # type: ignore[assignment]
    operator, tiles, q, v = plan.operator, plan.tiles, inputs[0], inputs[2]
    beside = len(plan.lanes) > 1  # one lane's outputs wait for its scan anyway
    with _together(q, plan, "forward pass", beside=beside) as side:
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
                for tiles, (start,) in _kinds_of_tiles(plan, lane, states):
                    own = operator.outputs(of_lane[lane], start, tiles, out=own)
                assert own is not None
                o.put(lane, own)
        whole = None
        if plan.problem.return_state:
            whole = scan.states_to_all(in_order(final, plan), plan.state_shape, plan)
    return o.whole, whole, states.flat


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
    do, dfinal = (None if x is None else row_major(x) for x in (do, dfinal))  # repeated passes look at memory alone
    found = _repeated(_backward_pass, (*inputs, flat_states, do, dfinal), plan, needs_gate_grads)
    if not (needs_gate_grads and plan.operator.by_token):
        return found
    *grads, dinitial = found
    for name in plan.operator.by_token:
        place = len(plan.operator.tokens) + plan.operator.heads.index(name)
        grads[place] = cast(Tensor, grads[place]).sum((0, 2))
    return *grads, dinitial


def _backward_pass(*given: Any) -> tuple[Tensor | None, ...]:
    inputs: Inputs
    *inputs, flat_states, do, dfinal, plan, needs_gate_grads = given  # type: ignore[assignment]
    problem, operator, tiles, q = plan.problem, plan.operator, plan.tiles, inputs[0]
    if do is None:
        do = q.new_zeros(q.shape[0], problem.heads, q.shape[2], problem.dv)
    do = row_major(do)
    if dfinal is not None:
        dfinal = contiguous(dfinal, dfinal.dtype)
    with _together(q, plan, "backward pass", beside=True) as side:
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

        # Heads that share an input add up, in fp32, in the order of the heads.
        learnt = operator.tokens if needs_gate_grads else operator.tokens[:3]
        wanted = tuple(name for name in learnt if name not in operator.fixed)
        given_as = dict(zip(operator.tokens, inputs, strict=False))
        if needs_gate_grads:
            given_as |= {name: given_as[like] for name, like in operator.by_token.items()}
            wanted += tuple(operator.by_token)
        grads = {name: LaneTokens(given_as[name], ends.like.dtype, plan) for name in wanted}
        dtypes = {name: grad.wide for name, grad in grads.items()}
        late = tuple(name for name in wanted if name not in operator.early)

        # What early gradients leave for late ones, and these for those of heads, of each kind of tiles.
        kept: dict[tuple[Lane, int], dict[str, Tensor]] = {}

        def put(
            names: tuple[str, ...], lane: Lane, compute: Callable[..., dict[str, Any]], *given: LaneStates, late: bool
        ) -> None:
            with trace.span(", ".join(f"d{name}" for name in names), plan.rank, lane, q):
                own = {name: grads[name].place(lane) for name in names}
                for kind, (tiles, from_states) in enumerate(_kinds_of_tiles(plan, lane, *given)):
                    more = {"kept": kept.pop((lane, kind), {})} if late else {}
                    found = compute(of_lane[lane], *from_states, do_of[lane], tiles, own, dtypes, **more)
                    own |= {name: found.pop(name) for name in names}
                    kept[lane, kind] = found
                for name in names:
                    grad = own[name]
                    assert grad is not None
                    grads[name].put(lane, grad)

        if operator.early:
            for lane in plan.lanes:
                put(operator.early, lane, operator.early_gradients, states, late=False)
        for lane in plan.lanes:
            side.join(lane, plan.rank, q)
            put(late, lane, operator.late_gradients, states, ends, late=True)

        head_grads: list[Tensor | None] = [None] * len(operator.heads)
        of_tiles = set(operator.heads) - set(operator.fixed) - set(operator.by_token)
        if needs_gate_grads and of_tiles:
            shares = {
                lane: [
                    operator.head_gradients(of_lane[lane], *from_states, do_of[lane], tiles, kept=kept[lane, kind])
                    for kind, (tiles, from_states) in enumerate(_kinds_of_tiles(plan, lane, states, ends))
                ]
                for lane in plan.lanes
            }
            for place, name in enumerate(operator.heads):
                added = in_order(
                    {lane: _of_every_tile([x[name] for x in share], plan) for lane, share in shares.items()}, plan
                )
                like = inputs[len(operator.tokens) + place]
                head_grads[place] = scan.head_gradient_to_first(added, like, name, plan)
        for name in operator.by_token if needs_gate_grads else ():
            head_grads[operator.heads.index(name)] = grads[name].whole
        dinitial_whole = None
        if plan.any_initial:
            dinitial_whole = scan.states_to_first(in_order(dinitial, plan), plan.state_shape, plan)
    token_grads = [grads[name].whole if name in grads else None for name in operator.tokens]
    return *token_grads, *head_grads, dinitial_whole if problem.has_initial else None


def _kinds_of_tiles(plan: Plan, lane: Lane, *states: LaneStates) -> Iterator[tuple[Tiles, list[Tensor]]]:
    """The tiles that have states, with the lane's, and those of sequences that are alone, with zeros. What is computed
    of the second goes where that of the first is."""
    if plan.linked:
        yield plan.tiles, [x[lane] for x in states]
    if plan.alone is not None:
        yield plan.alone, [plan.zero_states(lane)] * len(states)


def _of_every_tile(kinds: list[Tensor], plan: Plan) -> Tensor:
    """What each tile adds, (B, heads, tiles, ...) of each kind of tiles, in the order of the row."""
    if len(kinds) == 1:
        return kinds[0]
    assert plan.alone is not None
    number_of = {start: number for number, (start, _) in enumerate(plan.every_tile.spans)}
    whole = kinds[0].new_empty(*kinds[0].shape[:2], len(number_of), *kinds[0].shape[3:])
    for tiles, own in zip((plan.tiles, plan.alone), kinds, strict=True):
        whole[:, :, index_of(tuple(number_of[start] for start, _ in tiles.spans), own.device)] = own
    return whole


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


class _Side:
    """The stream beside the current one on which scans run, so that a lane waits for its neighbour while others
    compute. Without a group, or on the CPU, there is none, and everything runs in program order."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.main = None if stream is None else torch.cuda.current_stream(stream.device)
        self.begin: dict[Lane, torch.cuda.Event] = {}
        self.end: dict[Lane, torch.cuda.Event] = {}

    def after(self, lane: Lane) -> None:
        """The scan of this lane may begin when what was launched so far is done."""
        if self.main is not None:
            self.begin[lane] = _mark(self.main)

    def scan(
        self,
        states: LaneStates,
        initial: Tensor | None,
        of_lane: Mapping[Lane, Mapping[str, Tensor]],
        plan: Plan,
        *,
        reverse: bool,
    ) -> dict[Lane, Tensor]:
        """Launch the scans of all lanes; `join` waits for one. Returns the states at the end, where somebody asked."""
        final: dict[Lane, Tensor] = {}
        if not plan.linked:
            return final
        if self.stream is not None and self.main is not None and initial is not None:
            self.stream.wait_stream(self.main)  # the initial states have come on the main stream
            initial.record_stream(self.stream)
        with self._beside():
            for lane in plan.lanes:
                if self.stream is not None:
                    recording.wait(self.stream, self.begin[lane])
                own = None if initial is None else initial[:, lane.heads].contiguous()
                keep = plan.operator.transitions(of_lane[lane], plan.tiles)
                end = scan.scan(states[lane], own, keep, plan, lane, reverse=reverse)
                if end is not None:
                    final[lane] = end
                if self.stream is not None and self.main is not None:
                    if end is not None:
                        end.record_stream(self.main)
                    self.end[lane] = _mark(self.stream)
        return final

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the side stream."""
        if self.stream is None or self.main is None:
            yield
            return
        _note_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield
        _note_stream(self.main)

    def join(self, lane: Lane, rank: int, like: Tensor) -> None:
        if lane in self.end and self.main is not None:
            with trace.span("wait", rank, lane, like):
                recording.wait(self.main, self.end[lane])


def _note_stream(stream: torch.cuda.Stream) -> None:
    recording.note(recording.OnStream(partial(torch.cuda.set_stream, stream), stream=stream))


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind what the stream has been given so far."""
    event = torch.cuda.Event()
    recording.mark(stream, event)
    return event


@contextmanager
def _together(x: Tensor, plan: Plan, phase: str, *, beside: bool) -> Iterator[_Side]:
    """One pass over a group (or on this device alone): fp32 sums stay fp32 under autocast, and what was sent has left
    at the end. beside: the scan has a stream of its own."""
    if plan.transport is None and not torch.is_autocast_enabled(x.device.type):
        yield _Side(None)
        return
    stream = None
    if beside and plan.transport is not None and plan.transport.size > 1 and x.is_cuda:
        streams = plan.transport.streams
        if x.device not in streams:
            # Before waiting outputs: the next rank waits for what this stream computes.
            streams[x.device] = torch.cuda.Stream(x.device, priority=-1)
        stream = streams[x.device]
    with torch.autocast(x.device.type, enabled=False):
        if plan.transport is None:
            yield _Side(None)
        else:
            with plan.transport.call(phase):
                yield _Side(stream)
                recording.take(plan.transport.flush, aside=True)
