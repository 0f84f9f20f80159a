"""Launches that are being noted, and what the host does between them, so that a call can be repeated
(leetdist.kernels.runtime.replay)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

_thread = threading.local()


class Number(int):
    """An integer argument of launches that is another in each call of a kind. source: which of the call's `numbers`."""

    source: int


@dataclass(frozen=True, eq=False)
class TritonLaunch:
    """The compiled kernel (None: only Triton knows), the grid of three numbers, all arguments with the constants."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class CudaLaunch:
    """The kernel (leetdist.kernels.runtime.cuda_launch.Kernel), grid, threads and arguments: addresses are integers,
    maps of tensors bytes that say what they are of."""

    kernel: Any
    grid: tuple[int, ...]
    block: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class HostStep:
    """Something that the host does between launches, and does again where they are repeated. aside: it gives no stream
    anything, so it may as well come after the launches."""

    step: Callable[[], Any]
    aside: bool = False


@dataclass(frozen=True, eq=False)
class OnStream(HostStep):
    """What follows is launched on this stream."""

    stream: Any = None


@dataclass(frozen=True, eq=False)
class Mark(HostStep):
    """An event behind what a stream has been given so far."""

    stream: Any = None
    event: Any = None


@dataclass(frozen=True, eq=False)
class Wait(HostStep):
    """A stream waits for an event."""

    stream: Any = None
    event: Any = None


@dataclass(frozen=True, eq=False)
class TensorStep:
    """The same with tensors that the call has taken, or parts of them: a message that leaves from one, or comes into
    it."""

    step: Callable[..., Any]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class LibraryCall:
    """A library's function that gives the current stream something, as a launch does: function(stream, *addresses), of
    tensors that the call has taken, or parts of them."""

    function: Callable[..., None]
    tensors: tuple[Tensor, ...]


def take(step: Callable[[], Any] | HostStep, *, aside: bool = False) -> None:
    """Do a step of the host, and note it. aside: see HostStep."""
    event = step if isinstance(step, HostStep) else HostStep(step, aside)
    _take(event, event.step)


def mark(stream: Any, event: Any) -> None:
    """Streams are torch.cuda.Stream, events torch.cuda.Event."""
    take(Mark(partial(event.record, stream), stream=stream, event=event))


def wait(stream: Any, event: Any) -> None:
    take(Wait(partial(stream.wait_event, event), stream=stream, event=event))


def take_with(step: Callable[..., Any], *tensors: Tensor) -> None:
    """Do a step of the host with tensors, and note it."""
    _take(TensorStep(step, tensors), step, *tensors)


def call_library(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call a library's function, and note it."""
    device = tensors[0].device
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    _take(LibraryCall(function, tensors), partial(function, stream, *[x.data_ptr() for x in tensors]))


def _take(event: HostStep | TensorStep | LibraryCall, step: Callable[..., Any], *given: Tensor) -> None:
    events = _thread.__dict__.get("events")
    if events is None:
        step(*given)
        return
    _thread.events = None  # what a step does is its own, and not noted
    try:
        step(*given)
    finally:
        _thread.events = events
    events.append(event)


def record_into(events: list[Any] | None) -> None:
    """Note this thread's launches in a list, until told None."""
    _thread.events, _thread.kept = events, {}


def the_same(name: Hashable, take: Callable[[], Tensor]) -> Tensor:
    """Memory that a call writes anew each time it asks for it by this name. What is noted holds all that it takes to
    its end, so it takes this once."""
    if not noting():
        return take()
    kept: dict[Hashable, Tensor] = _thread.kept
    found = kept.get(name)
    if found is None:
        found = kept[name] = take()
    return found


def note(event: TritonLaunch | CudaLaunch | HostStep | TensorStep | LibraryCall) -> None:
    events = _thread.__dict__.get("events")
    if events is not None:
        events.append(event)


def refuse() -> None:
    """What comes now is more than launches that are noted: whoever records it cannot repeat it."""
    note(TritonLaunch(None, (1, 1, 1), ()))


def noting() -> bool:
    return _thread.__dict__.get("events") is not None
