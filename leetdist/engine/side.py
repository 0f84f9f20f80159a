"""Scans beside what else a pass computes, on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from leetdist.arguments import autocasts, without_autocast
from leetdist.engine import scan, trace
from leetdist.engine.filling import LaneStates
from leetdist.engine.lanes import Lane
from leetdist.engine.plan import Plan
from leetdist.kernels.runtime import recording


class Side:
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
def one_pass(x: Tensor, plan: Plan, phase: str, *, beside: bool) -> Iterator[Side]:
    """One pass over a group (or on this device alone): fp32 sums stay fp32 under autocast, and what was sent has left
    at the end. beside: the scan has a stream of its own."""
    if plan.transport is None and not autocasts(x.device):
        yield Side(None)
        return
    stream = None
    if beside and plan.transport is not None and plan.transport.size > 1 and x.is_cuda:
        streams = plan.transport.streams
        if x.device not in streams:
            # Before waiting outputs: the next rank waits for what this stream computes.
            streams[x.device] = torch.cuda.Stream(x.device, priority=-1)
        stream = streams[x.device]
    with without_autocast(x.device):
        if plan.transport is None:
            yield Side(None)
        else:
            with plan.transport.call(phase):
                yield Side(stream)
                recording.take(plan.transport.flush, aside=True)
