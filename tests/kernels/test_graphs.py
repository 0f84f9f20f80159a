"""Graphs of repeated calls: for which addresses there is one, and what it launches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from leetdist.kernels.runtime import recording

replay = pytest.importorskip("leetdist.kernels.runtime.replay")
graphs = pytest.importorskip("leetdist.kernels.runtime.graphs")
repeated_launch = pytest.importorskip("leetdist.kernels.runtime.repeated_launch")
DEVICE = torch.device("cuda", 0)
MAIN, SIDE = (SimpleNamespace(cuda_stream=handle) for handle in (0, 7))
OK, FAILED = 0, 901


class Driver:
    """Stands for CUDA's: a graph is a list of what was launched on streams that capture. A stream beside the first
    joins by an event, and its work is lost (an error) unless the first waits for it."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUgraphInstantiate_flags = SimpleNamespace(CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY=8)

    def __init__(self) -> None:
        self.streams = self.captured = self.launched = 0
        self.graph: list[Callable[[], None]] = []
        self.done: dict[int, set[int]] = {}  # by stream that captures: what of the graph comes before what it is given
        self.events: dict[int, set[int]] = {}
        self.flags: list[int] = []
        self.destroyed: list[Any] = []
        self.on: list[int] = []  # streams that graphs were launched on
        self.full = False  # no memory for a graph's first launch

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        if stream not in self.done:
            return work()
        self.done[stream].add(len(self.graph))
        self.graph.append(work)
        return None

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[int, int]:
        self.streams += 1
        return OK, 100 + self.streams

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.graph, self.done = [], {stream: set()}
        return (OK,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:
        self.events[event] = set(self.done[stream])
        return (OK,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        self.done[stream] = self.done.get(stream, set()) | self.events[event]
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        whole = len(self.done[stream]) == len(self.graph)
        self.done = {}
        self.captured += 1
        return OK if whole else FAILED, self.graph

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        self.flags.append(flags)
        return OK, graph

    def cuGraphDestroy(self, graph: Any) -> tuple[int]:
        return (OK,)

    def cuGraphExecDestroy(self, graph: Any) -> tuple[int]:
        self.destroyed.append(graph)
        return (OK,)

    def cuGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        if self.full:
            return (FAILED,)
        self.launched += 1
        self.on.append(stream)
        for work in graph:
            work()
        return (OK,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(graphs, "_driver", lambda: made)
    monkeypatch.setattr(graphs, "_on_gpu", lambda device: True)
    monkeypatch.setattr(graphs, "_capturing", lambda: False)
    monkeypatch.setattr(graphs, "_idle", {})
    monkeypatch.setattr(graphs, "_known", {})
    monkeypatch.setattr(graphs, "_seen", {})
    monkeypatch.setattr(graphs, "_late", 0)
    return made


class Launch(repeated_launch.CudaStep):
    def __init__(self, launched: Callable[[int, Any], None]) -> None:
        self.launched = launched

    def __call__(self, stream: int, addresses: Any) -> None:
        self.launched(stream, addresses)


def steps_of(driver: Driver, log: list[Any], *, joined: bool) -> list[Any]:
    """A call with a stream beside it."""
    begin, end = SimpleNamespace(cuda_event=1), SimpleNamespace(cuda_event=2)

    def launched(name: str) -> Any:
        return Launch(lambda stream, addresses: driver.launch(stream, lambda: log.append((name, *addresses))))

    pass_ = lambda: None  # noqa: E731
    steps = [
        launched("states"), recording.Mark(pass_, stream=MAIN, event=begin), recording.OnStream(pass_, stream=SIDE),
        recording.Wait(pass_, stream=SIDE, event=begin), launched("fold"), recording.HostStep(pass_, aside=True),
        recording.Mark(pass_, stream=SIDE, event=end), recording.OnStream(pass_, stream=MAIN), launched("dq"),
    ]  # fmt: skip
    return [*steps, *([recording.Wait(pass_, stream=MAIN, event=end)] if joined else []), launched("dk")]


@pytest.mark.parametrize("joined", [True, False])
def test_the_second_call_with_addresses_is_captured(driver: Driver, joined: bool) -> None:
    """What no graph can hold goes on as ever."""
    log: list[Any] = []
    of_kind, counter = graphs.in_graphs(DEVICE, steps_of(driver, log, joined=joined), 0)
    assert of_kind.beside
    assert counter.aside
    launched = [of_kind.launch(addresses, 0) for addresses in ((1, 2), (1, 2), (3, 2), (1, 2), (3, 2), (3, 2))]
    if not joined:
        assert not any(launched)
        assert driver.captured == 1
        assert log == []
        return
    assert launched == [False, True, False, True, True, True]
    assert (driver.captured, driver.launched, driver.streams) == (2, 4, 2)
    assert driver.flags == [8, 8]
    names = "states", "fold", "dq", "dk"
    assert log == [(name, first, 2) for first in (1, 1, 3, 3) for name in names]
    graphs._known.clear()
    assert len(driver.destroyed) == 2


def test_there_is_an_end_of_graphs(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room, calls go on as ever; and after many of them, all graphs are made anew."""
    monkeypatch.setattr(graphs, "MOST", 2)
    monkeypatch.setattr(graphs, "PATIENCE", 3)
    of_kind, _ = graphs.in_graphs(DEVICE, steps_of(driver, [], joined=True), 0)
    assert [of_kind.launch((x,), 0) for x in (1, 2, 3) for _ in range(2)] == [False, True] * 2 + [False] * 2
    assert [of_kind.launch((x,), 0) for x in (3, 1, 3, 2)] == [False, True, False, True]
    assert not of_kind.launch((3,), 0)
    assert len(driver.destroyed) == 2
    assert [of_kind.launch((x,), 0) for x in (3, 1)] == [True, True]
    assert driver.captured == 4


def test_what_is_launched_one_by_one(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch alone, other numbers in each call, what the host does between launches, a CPU; and into a graph of the
    caller's."""
    log: list[Any] = []
    steps = steps_of(driver, log, joined=True)
    assert graphs.in_graphs(DEVICE, steps[:1], 0) == steps[:1]
    assert graphs.in_graphs(DEVICE, steps, 1) == steps
    message = [*steps[:1], recording.HostStep(print), *steps[1:]]
    assert graphs.in_graphs(DEVICE, message, 0) == message
    of_kind, _ = graphs.in_graphs(DEVICE, steps, 0)
    monkeypatch.setattr(graphs, "_capturing", lambda: True)
    assert not any(of_kind.launch((1,), 0) for _ in range(4))
    monkeypatch.setattr(graphs, "_capturing", lambda: False)
    assert [of_kind.launch((1,), 0) for _ in range(2)] == [False, True]
    monkeypatch.setattr(graphs, "_on_gpu", lambda device: False)
    assert graphs.in_graphs(DEVICE, steps, 0) == steps


def test_kinds_at_the_same_addresses_have_graphs_of_their_own(driver: Driver) -> None:
    """Which run on the stream of the call, whatever the first one's was."""
    logs: list[list[Any]] = [[], []]
    kinds = [graphs.in_graphs(DEVICE, steps_of(driver, log, joined=True), 0)[0] for log in logs]
    launched = [[kind.launch((1, 2), stream) for kind in kinds] for stream in (0, 0, 5)]
    assert launched == [[False] * 2, [True] * 2, [True] * 2]
    assert (driver.captured, driver.on) == (2, [0, 0, 5, 5])
    assert logs[0] == logs[1] == [(name, 1, 2) for name in ("states", "fold", "dq", "dk")] * 2


def test_a_capture_of_the_callers_lets_go_of_no_graph(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    monkeypatch.setattr(graphs, "PATIENCE", 0)
    of_kind, _ = graphs.in_graphs(DEVICE, steps_of(driver, [], joined=True), 0)
    assert [of_kind.launch((x,), 0) for x in (1, 1, 2)] == [False, True, False]
    monkeypatch.setattr(graphs, "_capturing", lambda: True)
    assert not of_kind.launch((2,), 0)
    assert driver.destroyed == []
    monkeypatch.setattr(graphs, "_capturing", lambda: False)
    assert not of_kind.launch((2,), 0)
    assert len(driver.destroyed) == 1


def test_a_graph_that_cannot_be_launched_is_none(driver: Driver) -> None:
    """Its launches go one by one then, which say what is wrong where it was not the graph."""
    of_kind, _ = graphs.in_graphs(DEVICE, steps_of(driver, [], joined=True), 0)
    driver.full = True
    assert not any(of_kind.launch((1,), 0) for _ in range(3))
    assert driver.captured == len(driver.destroyed) == 1
    assert not graphs._known


def test_threads_leave_no_streams_behind(driver: Driver) -> None:
    of_kind, _ = graphs.in_graphs(DEVICE, steps_of(driver, [], joined=True), 0)
    for x in range(3):
        with ThreadPoolExecutor(1) as thread:
            assert [thread.submit(of_kind.launch, (x,), 0).result() for _ in range(2)] == [False, True]
    assert driver.streams == 2
    assert {place: len(streams) for place, streams in graphs._idle.items()} == {(DEVICE, 0): 1, (DEVICE, 1): 1}


@pytest.mark.real_empty
def test_calls_in_a_loop_are_graphs(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits, forward and backward, whatever the addresses: those that come again, and others."""
    monkeypatch.syspath_prepend("tests/engine")
    from rehearsal import rehearsed

    def handed(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Any:
        return SimpleNamespace(
            function=lambda *given: driver.launch(given[3], partial(kernel.launch, *given)), before=grid, after=(),
            together=False, arguments=list(arguments), places=range(len(arguments)),
        )  # fmt: skip

    pool: dict[Any, Tensor] = {}
    calls = 0

    def taking(device: torch.device) -> Callable[..., Tensor]:
        nonlocal calls
        calls += 1
        number = iter(range(100))

        def take(shape: Any, strides: Any, dtype: Any) -> Tensor:
            key = calls % 2, next(number), shape, strides, dtype  # of either pass
            if key not in pool:
                pool[key] = torch.empty_strided(shape, strides, dtype=dtype)
            return pool[key]

        return take

    decay = torch.tensor([-0.01, -0.5])
    inputs = [torch.randn(1, 2, 96, 16) for _ in range(4)]

    def both() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        o = leetdist.linear_attention(*leaves, decay, tile=32, method="block")
        return [x.clone() for x in (o.detach(), *torch.autograd.grad(o, leaves, inputs[3]))]

    wanted = [both()]
    for x in inputs:
        x.mul_(0.5)
    wanted.append(both())
    with rehearsed(), monkeypatch.context() as within:  # undone before what it stands on
        within.setattr(repeated_launch.triton_driver, "handed", handed)
        within.setattr(replay, "_taking", taking)
        for number in range(8):
            for x in inputs:
                x.mul_(2.0 if number % 2 == 0 else 0.5)
            assert all(map(torch.equal, both(), wanted[number % 2])), number
    assert (driver.captured, driver.launched) == (2, 2 * (8 - 3))


@pytest.mark.gpu
@pytest.mark.real_empty
def test_graphs_on_a_gpu() -> None:
    """Equal bits in a loop, also where all graphs are let go of while they run, and where the caller captures."""
    decay = torch.tensor([-0.01, -0.5], device="cuda")
    inputs = [torch.randn(1, 2, 1500, 128, device="cuda").bfloat16() for _ in range(4)]

    def both() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        o = leetdist.linear_attention(*leaves, decay, scale=0.1, method="block")
        return [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]

    replay._kinds.clear()
    replay._once.clear()
    graphs._known.clear()
    wanted, most = both(), 0
    for number in range(24):
        assert all(map(torch.equal, both(), wanted)), number
        most = max(most, len(graphs._known))
        if number == 12:
            both()
            graphs._known.clear()
    assert most >= 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    assert all(map(torch.equal, captured, wanted))
