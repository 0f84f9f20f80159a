"""A Chrome trace of the engine: what each rank computes, sends, receives and waits for, lane by lane.

`LEETDIST_TRACE=trace.json python ...`, then open the file in https://ui.perfetto.dev or chrome://tracing. Every rank is
a process of the picture, every lane a thread of it. Ranks on one host share the file; on several hosts each host has
its own. On the GPU the spans are what the stream did (CUDA events, read when the program ends or `save` is called), on
the CPU what the host did. A rank waits inside "receive"; on a GPU, where scans have a stream of their own, "wait" is
what is left of that for the stream that computes.

Off, it costs one comparison a span.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from leetdist.engine.lanes import Lane

_file: str | None = os.environ.get("LEETDIST_TRACE")
_spans: list[tuple[str, int, int, Any, Any]] = []
_lock = threading.Lock()
_base: tuple[float, torch.cuda.Event] | None = None
_off = nullcontext()


def span(name: str, rank: int, lane: Lane | None, like: Tensor) -> AbstractContextManager[None]:
    """Records what happens inside, on the device of `like`, as `name` of a rank and lane."""
    if _file is None or torch.compiler.is_compiling():
        return _off
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return _off
    return _span(name, rank, 0 if lane is None else lane.number, like)


def on() -> bool:
    return _file is not None


def start(file: str) -> None:
    """Trace from now on into `file`, to which all ranks of a host append; LEETDIST_TRACE does so from the beginning."""
    global _file
    _file = file


def stop() -> None:
    """Save what was recorded, and trace no more."""
    global _file
    save()
    _file = None


def save() -> None:
    """Write what was recorded so far, and forget it."""
    global _spans
    with _lock:
        spans, _spans = _spans, []
    if _file is None or not spans:
        return
    if _base is not None:
        torch.cuda.synchronize()
    events: list[dict[str, Any]] = []
    for rank in sorted({rank for _, rank, *_ in spans}):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
    for name, rank, lane, begin, end in spans:
        first, last = _microseconds(begin), _microseconds(end)
        events.append(
            {"name": name, "cat": name, "ph": "X", "pid": rank, "tid": lane, "ts": first, "dur": last - first}
        )
    with open(_file, "a") as out:
        # The trace format lets an array be unfinished, so that processes can append to it one after the other.
        fcntl.flock(out, fcntl.LOCK_EX)
        lead = "[\n" if out.tell() == 0 else ",\n"
        out.write(lead + ",\n".join(json.dumps(event) for event in events))


@contextmanager
def _span(name: str, rank: int, lane: int, like: Tensor) -> Iterator[None]:
    begin = _now(like)
    try:
        yield
    finally:
        end = _now(like)
        with _lock:
            _spans.append((name, rank, lane, begin, end))


def _now(like: Tensor) -> Any:
    if not like.is_cuda:
        return time.time()
    global _base
    event = torch.cuda.Event(enable_timing=True)
    if _base is None:
        first = torch.cuda.Event(enable_timing=True)
        first.record()
        first.synchronize()
        _base = (time.time(), first)
    event.record()
    return event


def _microseconds(moment: Any) -> float:
    if isinstance(moment, float):
        return moment * 1e6
    assert _base is not None
    return _base[0] * 1e6 + _base[1].elapsed_time(moment) * 1e3


atexit.register(save)
