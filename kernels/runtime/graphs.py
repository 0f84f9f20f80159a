"""All launches of a repeated call as one: CUDA graphs, for the addresses that come again.

Allocators hand out the same few addresses, so in a loop of equal steps each call has those that it had a step before.
The second time that a kind of call has the same ones its launches are captured, and from then on the host launches one
graph instead of them, in which scans beside the outputs (leetdist.engine.side) need no events either. Nothing is
copied, and no memory is held: a graph is launched only where a call has the very addresses that it was made for, and
does then what the launches would do, in their order. Others are launched one by one, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeAlias

import torch

from leetdist.kernels.runtime import recording
from leetdist.kernels.runtime.cuda_launch import check
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.repeated_launch import CudaStep, TritonStep

LEAST = 2  # launches: one is as quick by itself
MOST = 1024  # graphs, of some 70 KiB each: a model has as many as layers, passes and places of messages
PATIENCE = 16 * MOST  # calls that find no room before all is made anew: making one takes as long as a few calls

Key: TypeAlias = "tuple[Graphs, tuple[int, ...]]"
Steps: TypeAlias = "Sequence[Any]"  # launches, called with a stream and the addresses, and steps between streams

_idle: dict[tuple[torch.device, int], list[int]] = {}  # streams for captures, those that no thread has now
_known: dict[Key, Graph] = {}
_seen: Memo[Key, None] = Memo(2 * MOST)
_late = 0  # calls that found no room


class Graph:
    """An executable graph of the driver's."""

    def __init__(self, handle: Any) -> None:
        self.handle, driver = handle, _driver()
        self.launched, self.destroyed = driver.cuGraphLaunch, driver.cuGraphExecDestroy

    def launch(self, stream: int) -> bool:
        return int(self.launched(self.handle, stream)[0]) == 0

    def __del__(self) -> None:
        self.destroyed(self.handle)


class Graphs:
    """Of one kind of call."""

    def __init__(self, device: torch.device, steps: Steps) -> None:
        self.device, self.steps = device, steps
        self.beside = any(isinstance(step, recording.OnStream) for step in steps)
        self.failed = False

    def launch(self, addresses: tuple[int, ...], stream: int) -> bool:
        """Launch the graph for these addresses on the stream; False where there is none, or a graph is in the making
        there."""
        if _capturing():  # may neither make graphs nor let go of any
            return False
        key = self, addresses
        graph = _known.get(key)
        if graph is None:
            if self.failed or not _comes_again(key):
                return False
            graph = self._captured(addresses, stream)
            if graph is None:
                self.failed = True
                return False
            _known[key] = graph
        if not graph.launch(stream):  # its first launch takes memory, of which there may be no more
            self.failed = True
            _known.pop(key, None)
            return False
        return True

    def _captured(self, addresses: tuple[int, ...], stream: int) -> Graph | None:
        """None where the driver cannot: it has no more memory, say."""
        driver = _driver()
        own: dict[int, int] = {}  # for the call's: on some, the default one too, nothing can be captured

        def of(other: int) -> int:
            if other not in own:
                own[other] = _stream(self.device, len(own))
            return own[other]

        try:
            first = current = of(stream)
            # Other threads, and libraries in them, go on as they like.
            check(driver.cuStreamBeginCapture(first, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)[0])
            try:
                for step in self.steps:
                    if isinstance(step, recording.OnStream):
                        current = of(step.stream.cuda_stream)
                    elif isinstance(step, recording.Mark):
                        check(driver.cuEventRecord(step.event.cuda_event, of(step.stream.cuda_stream))[0])
                    elif isinstance(step, recording.Wait):
                        check(driver.cuStreamWaitEvent(of(step.stream.cuda_stream), step.event.cuda_event, 0)[0])
                    else:
                        step(current, addresses)
            finally:
                result, graph = driver.cuStreamEndCapture(first)
            check(result)
            # Beside the outputs, a scan keeps its stream's priority.
            flags = driver.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY
            result, made = driver.cuGraphInstantiate(graph, int(flags) if self.beside else 0)
            driver.cuGraphDestroy(graph)
            check(result)
        except RuntimeError:
            return None
        for number, free in enumerate(own.values()):  # after a failure, what they are in is not known
            _idle[self.device, number].append(free)
        return Graph(made)


def _comes_again(key: Key) -> bool:
    """Whether a kind of call has had these addresses before, and there is room for its graph."""
    global _late
    if key not in _seen:
        _seen[key] = None
        return False
    if len(_known) < MOST:
        return True
    _late += 1
    if _late > PATIENCE:
        _late = 0
        _known.clear()
    return False


@cache
def _driver() -> Any:
    """None without the packages that kernels in CUDA C++ need too."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _capturing() -> bool:
    return bool(torch._C._cuda_isCurrentStreamCapturing())


def _stream(device: torch.device, number: int) -> int:
    """A stream that nobody else knows or uses now; those beside the first have scans' priority."""
    with suppress(IndexError):
        return _idle.setdefault((device, number), []).pop()
    driver = _driver()
    flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    result, made = driver.cuStreamCreateWithPriority(flags, -1 if number else 0)
    check(result)
    return int(made)


def in_graphs(device: torch.device, actions: Sequence[Any], numbers: int) -> list[Any]:
    """What a call does, in graphs: its launches, and then what comes aside. As it is where each call has other
    addresses, by its numbers, and where the host does more between launches: it passes messages on. By NCCL no message
    is captured here: it must be on both of its ranks, which find their addresses again at different times, and may be
    tied to the memory behind an address (benchmarks/notes/ranks.md). Graphs of the two to four launches between
    messages were no faster."""
    steps = [x for x in actions if not (isinstance(x, recording.HostStep) and x.aside)]
    launches = sum(isinstance(x, (CudaStep, TritonStep)) for x in steps)
    between = sum(isinstance(x, (recording.OnStream, recording.Mark, recording.Wait)) for x in steps)
    if launches < LEAST or launches + between < len(steps) or numbers or not _on_gpu(device) or _driver() is None:
        return list(actions)
    return [Graphs(device, steps), *[x for x in actions if isinstance(x, recording.HostStep) and x.aside]]
