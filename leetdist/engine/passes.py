"""The operator's two passes: local kernels, the scan between them, and the exact backward.

`leetdist.engine.autograd` makes them one differentiable function, `leetdist.engine.ops` custom ops for torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from leetdist.engine import scan, trace
from leetdist.engine.plan import Lane, Plan
from leetdist.kernels.common.recording import HostStep, note, take


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, Tensor]:
    """With S the state at each tile's start (L what a tile adds to it):

        L = tile_states(k, v)      S = scan(L)      o = LA(q, k, v; S)

    Returns o, the final state (if the problem asks for it) and S, all in one row of numbers.
    """
    return cast(Any, _repeated(_forward_pass, (q, k, v, log_decay, initial_state), plan))


def _forward_pass(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, Tensor]:
    problem, kernels, tiles = plan.problem, plan.kernels, plan.tiles
    with _together(q, plan, beside=len(plan.lanes) > 1) as side:  # one lane's outputs wait for its scan anyway
        states = _Lanes(k.shape[0], k.shape[3], v.shape[3], q, plan)
        for lane in plan.lanes:
            with trace.span("tile states", plan.rank, lane, q):
                states.put(
                    lane,
                    kernels.tile_states,
                    _part(k, lane.kv),
                    _part(v, lane.kv),
                    _part(log_decay, lane.heads, 0),
                    tiles,
                    reverse=False,
                    to_end=plan.to_end(reverse=False),
                )
            side.after(lane)
        initial = None
        if plan.any_initial:
            initial = scan.states_from_first(initial_state, plan.state_shape, states.like, plan)
        final = side.scan(states, initial, log_decay, plan, reverse=False)
        o = _Heads(q, v.shape[3], q.dtype, plan)
        for lane in plan.lanes:
            side.join(lane, plan.rank, q)
            with trace.span("outputs", plan.rank, lane, q):
                o.put(
                    lane, kernels.tile_outputs, _part(q, lane.heads), _part(k, lane.kv), _part(v, lane.kv),
                    states[lane], _part(log_decay, lane.heads, 0), tiles,
                    reverse=False, scale=problem.scale, state_scale=problem.scale, out_dtype=q.dtype,
                )  # fmt: skip
        whole = None
        if problem.return_state:
            whole = scan.states_to_all(_in_order(final, plan), plan.state_shape, plan)
    return o.whole, whole, states.flat


def backward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    flat_states: Tensor,
    do: Tensor | None,
    dfinal: Tensor | None,
    plan: Plan,
    *,
    needs_decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """With R the gradient of the state at each tile's end:

        U = tile_states(q, do), reversed      R = scan(U), reversed
        dq = LA(do, v, k; S^T)      dk = LA(v, do, q; R^T), reversed      dv = LA(k, q, do; R), reversed

    dq needs no R, so it is computed while R's scan is under way. Returns dq, dk, dv, d log_decay, d initial_state (the
    last on the first rank, if the call has one).
    """
    return cast(Any, _repeated(_backward_pass, (q, k, v, log_decay, flat_states, do, dfinal), plan, needs_decay_grad))


def _backward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    flat_states: Tensor,
    do: Tensor | None,
    dfinal: Tensor | None,
    plan: Plan,
    needs_decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    problem, kernels, tiles, scale = plan.problem, plan.kernels, plan.tiles, plan.problem.scale
    if do is None:
        do = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], problem.dv)
    do = row_major(do)
    with _together(q, plan, beside=True) as side:
        states = _Lanes(k.shape[0], k.shape[3], v.shape[3], q, plan, flat_states)
        grads = _Lanes(k.shape[0], k.shape[3], v.shape[3], q, plan)
        for lane in plan.lanes:
            with trace.span("tile states", plan.rank, lane, q):
                grads.put(
                    lane, kernels.tile_states, _part(q, lane.heads), _part(do, lane.heads),
                    _part(log_decay, lane.heads, 0), tiles, reverse=True, scale=scale, to_end=plan.to_end(reverse=True),
                )  # fmt: skip
            side.after(lane)
        if problem.return_state and (dfinal is not None or plan.transport is not None):
            if dfinal is None:
                dfinal = grads.like.new_zeros(plan.state_shape)
            dfinal = scan.states_from_all(dfinal, plan)
        dinitial = side.scan(grads, dfinal, log_decay, plan, reverse=True)

        # Heads that share k and v add up, in fp32, in the order of the heads.
        wide = grads.like.dtype if problem.kv_heads < problem.heads else q.dtype
        dq = _Heads(q, problem.dk, q.dtype, plan)
        for lane in plan.lanes:
            with trace.span("dq", plan.rank, lane, q):
                dq.put(
                    lane, kernels.tile_outputs, _part(do, lane.heads), _part(v, lane.kv), _part(k, lane.kv),
                    states[lane].mT, _part(log_decay, lane.heads, 0), tiles,
                    reverse=False, scale=scale, state_scale=scale, out_dtype=q.dtype,
                )  # fmt: skip
        dk, dv = (_Heads(x, x.shape[3], wide, plan, shared=True) for x in (k, v))
        for lane in plan.lanes:
            side.join(lane, plan.rank, q)
            of_lane = (_part(q, lane.heads), _part(k, lane.kv), _part(v, lane.kv), _part(do, lane.heads))
            with trace.span("dk, dv", plan.rank, lane, q):
                common: dict[str, Any] = {"reverse": True, "scale": scale, "state_scale": 1.0, "out_dtype": wide}
                q_, k_, v_, do_ = of_lane
                dk.put(
                    lane, kernels.tile_outputs, v_, do_, q_, grads[lane].mT, _part(log_decay, lane.heads, 0), tiles,
                    **common,
                )  # fmt: skip
                dv.put(
                    lane, kernels.tile_outputs, k_, q_, do_, grads[lane], _part(log_decay, lane.heads, 0), tiles,
                    **common,
                )  # fmt: skip

        dlog_decay = None
        if needs_decay_grad:
            shares = {}
            for lane in plan.lanes:
                of_lane = (_part(q, lane.heads), _part(k, lane.kv), _part(v, lane.kv), _part(do, lane.heads))
                shares[lane] = kernels.decay_gradient(
                    *of_lane, states[lane], grads[lane], _part(log_decay, lane.heads, 0), tiles, scale=scale
                )
            dlog_decay = scan.decay_gradient_to_first(_in_order(shares, plan), log_decay, plan)
        dinitial_whole = None
        if plan.any_initial:
            dinitial_whole = scan.states_to_first(_in_order(dinitial, plan), plan.state_shape, plan)
    return dq.whole, dk.whole, dv.whole, dlog_decay, dinitial_whole if problem.has_initial else None


def _repeated(
    function: Any, tensors: tuple[Tensor | None, ...], plan: Plan, needs_decay_grad: bool | None = None
) -> tuple[Tensor | None, ...]:
    """One pass; where it has been seen before, and is nothing but launches, its launches again."""
    more = (plan,) if needs_decay_grad is None else (plan, needs_decay_grad)
    if not plan.repeatable or trace.on() or needs_decay_grad:
        return cast(Any, function(*tensors, *more))
    from leetdist.kernels.common.replay import repeated

    if plan.transport is None:
        return repeated(function, tensors, *more)
    place = plan.transport.place()
    if place is None:
        return cast(Any, function(*tensors, *more))
    stream = torch.cuda.current_stream(plan.problem.device)  # which steps of the host name, and come back to
    with plan.transport.call(), torch.cuda.stream(stream):
        return repeated(function, tensors, *more, where=(stream, place))


class _Lanes:
    """(B, lane's heads, tiles, rows, columns) of every lane, one lane after the other in `flat`."""

    def __init__(self, batch: int, rows: int, columns: int, x: Tensor, plan: Plan, flat: Tensor | None = None) -> None:
        self.like = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        tiles, heads = plan.tiles.count, plan.problem.heads
        self.one = len(plan.lanes) == 1
        self.shape = (batch, heads, tiles, rows, columns)
        if flat is None and not self.one:
            flat = self.like.new_empty(batch * heads * tiles * rows * columns)
        if flat is not None:
            self._set(flat, plan)

    def _set(self, flat: Tensor, plan: Plan) -> None:
        batch, heads, *rest = self.shape
        self.flat = flat
        parts = flat.split([flat.numel() // heads * lane.width for lane in plan.lanes])
        self.parts = {lane: part.view(batch, lane.width, *rest) for lane, part in zip(plan.lanes, parts, strict=True)}

    def __getitem__(self, lane: Lane) -> Tensor:
        return self.parts[lane]

    def put(self, lane: Lane, kernel: Any, *args: Any, **kwargs: Any) -> None:
        if self.one:
            self.parts = {lane: kernel(*args, **kwargs)}
            self.flat = self.parts[lane].flatten()
        else:
            kernel(*args, **kwargs, out=self.parts[lane])


class _Heads:
    """(B, H, N, D), filled lane by lane."""

    def __init__(self, x: Tensor, dim: int, dtype: torch.dtype, plan: Plan, *, shared: bool = False) -> None:
        self.one = len(plan.lanes) == 1
        self.shared = shared and plan.problem.kv_heads < plan.problem.heads
        self.kv_heads, self.kv = plan.problem.kv_heads, shared
        self.dtype = x.dtype
        if not self.one:
            self.whole = empty_as(x, x.shape[1], dim, x.dtype)

    def put(self, lane: Lane, kernel: Any, *args: Any, **kwargs: Any) -> None:
        if self.one:
            out = kernel(*args, **kwargs)
            self.whole = _sum_shared(out, self.kv_heads).to(self.dtype) if self.shared else out
        elif self.shared:
            kv = int(lane.kv.stop - lane.kv.start)
            self.whole[:, lane.kv] = _sum_shared(kernel(*args, **kwargs), kv).to(self.dtype)
        else:
            kernel(*args, **kwargs, out=self.whole[:, lane.kv if self.kv else lane.heads])


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
        self, states: _Lanes, initial: Tensor | None, log_decay: Tensor, plan: Plan, *, reverse: bool
    ) -> dict[Lane, Tensor]:
        """Launch the scans of all lanes; `join` waits for one. Returns the states at the end, where somebody asked."""
        final = {}
        if self.stream is not None and self.main is not None and initial is not None:
            self.stream.wait_stream(self.main)  # the initial states have come on the main stream
            initial.record_stream(self.stream)
        with self._beside():
            for lane in plan.lanes:
                if self.stream is not None:
                    take(partial(self.stream.wait_event, self.begin[lane]))
                own = None if initial is None else initial[:, lane.heads].contiguous()
                end = scan.scan(states[lane], own, _part(log_decay, lane.heads, 0), plan, lane, reverse=reverse)
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
        note(HostStep(partial(torch.cuda.set_stream, self.stream)))
        with torch.cuda.stream(self.stream):
            yield
        note(HostStep(partial(torch.cuda.set_stream, self.main)))

    def join(self, lane: Lane, rank: int, like: Tensor) -> None:
        if self.main is not None:
            with trace.span("wait", rank, lane, like):
                take(partial(self.main.wait_event, self.end[lane]))


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind what the stream has been given so far."""
    event = torch.cuda.Event()
    take(partial(event.record, stream))
    return event


@contextmanager
def _together(x: Tensor, plan: Plan, *, beside: bool) -> Iterator[_Side]:
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
            with plan.transport.call():
                yield _Side(stream)
                plan.transport.flush()


def _part(x: Tensor, heads: slice, dim: int = 1) -> Tensor:
    """x's `heads`; x itself where they are all, because a view takes a few microseconds too."""
    return x if heads.stop - heads.start == x.shape[dim] else x.narrow(dim, heads.start, heads.stop - heads.start)


def _in_order(lanes: dict[Lane, Tensor], plan: Plan) -> Tensor:
    """The lanes' parts along dimension 1, in the order of the heads."""
    if len(lanes) == 1:
        return lanes[plan.lanes[0]]
    return torch.cat([lanes[lane] for lane in sorted(plan.lanes, key=lambda lane: lane.heads.start)], 1)


def empty_as(x: Tensor, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, heads, N, dim), laid out in memory as x is: a (B, N, H, D) model gets its own layout back."""
    batch, _, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    return x.new_empty(batch, heads, tokens, dim, dtype=dtype)


def row_major(x: Tensor) -> Tensor:
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
