"""A stand-in for NCCL: functions of its names and arguments, whose messages go by gloo, and an event that is through
when it is told so."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from leetdist.sequence import direct, nccl

HANDLE = 77


class Event:
    """A torch.cuda.Event of a stream that has ended what it was given, unless `stuck`."""

    stuck = False

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return not Event.stuck


class Symbols:
    """`carry` (sends, receives) moves what was said in one group: (address, bytes, rank) each."""

    def __init__(self, carry: Callable[[list[Any], list[Any]], None] | None = None) -> None:
        self.calls: list[Any] = []
        self.results: dict[str, int] = {}  # that calls of a name return
        self.carry, self.depth = carry, 0
        self.sends: list[Any] = []
        self.receives: list[Any] = []
        for name in ("GetUniqueId", "CommInitRank", "Send", "Recv", "GroupStart", "GroupEnd", "CommGetAsyncError"):
            setattr(self, f"nccl{name}", self._named(name, getattr(self, name)))
        self.ncclCommAbort = self._named("CommAbort", lambda handle: 0)
        self.ncclGetErrorString = lambda result: f"error {result}".encode()
        self.ncclGetLastError = lambda handle: b"of the last words"

    def _named(self, name: str, function: Callable[..., int]) -> Any:
        def called(*args: Any) -> int:
            told = [x.value if isinstance(x, ctypes.c_void_p) else x for x in args]
            self.calls.append((name, *told))
            return self.results.get(name) or function(*args)

        return called

    def GetUniqueId(self, made: Any) -> int:
        ctypes.memmove(ctypes.addressof(made._obj), bytes(range(128)), 128)
        return 0

    def CommInitRank(self, handle: Any, size: int, identity: nccl.Identity, rank: int) -> int:
        assert bytes(identity) == bytes(range(128))
        handle._obj.value = HANDLE
        return 0

    def Send(self, address: int, count: int, kind: int, other: int, handle: Any, stream: int) -> int:
        self.sends.append((address, count, other))
        return self._moved()

    def Recv(self, address: int, count: int, kind: int, other: int, handle: Any, stream: int) -> int:
        self.receives.append((address, count, other))
        return self._moved()

    def GroupStart(self) -> int:
        self.depth += 1
        return 0

    def GroupEnd(self) -> int:
        self.depth -= 1
        return self._moved()

    def CommGetAsyncError(self, handle: Any, found: Any) -> int:
        found._obj.value = self.results.get("async", 0)
        return 0

    def _moved(self) -> int:
        if self.depth == 0:
            sends, receives, self.sends, self.receives = self.sends, self.receives, [], []
            if self.carry is not None:
                self.carry(sends, receives)
        return 0

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


def by_gloo(sends: list[Any], receives: list[Any]) -> None:
    def memory(address: int, count: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=torch.uint8)

    works = [dist.isend(memory(address, count).clone(), to, tag=7) for address, count, to in sends]
    works += [dist.irecv(memory(address, count), source, tag=7) for address, count, source in receives]
    for work in works:
        if work is not None:
            work.wait()


@contextmanager
def nccl_by_gloo(transport: Any, symbols: Any = None) -> Any:
    """A gloo transport takes NCCL's own calls, of the stand-in."""
    symbols = symbols or Symbols(by_gloo)
    library = nccl.Library(symbols)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(nccl.Library, "found", lambda: library)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(transport, "capturing", lambda: False)
        transport.staged = False
        with transport.call("set-up"):
            transport.direct = direct.connect(transport, torch.device("cpu"))
        yield symbols


def until(told: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end
        time.sleep(0.005)
