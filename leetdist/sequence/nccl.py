"""NCCL's own sends and receives, on the current stream, by a communicator beside the process group's.

Through PyTorch's process group a message takes the host 70 to 190 us, for streams, events and what its watchdog looks
at; NCCL's own call takes it a tenth. The library is the one that PyTorch has loaded. Who watches instead of PyTorch is
leetdist.sequence.watch.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from typing import Any

BYTES = 1  # ncclUint8: messages are bytes
IN_PROGRESS = 7  # of a communicator that does not block, which NCCL_COMM_BLOCKING=0 makes
NAMES = ("libnccl.so.2", "libtorch_cuda.so")  # the second has it within, or needs the first
ABORT_SECONDS = 2.0
POLL = 1e-4  # seconds between two looks at one that does not block


class Identity(ctypes.Structure):
    """ncclUniqueId, which ncclCommInitRank takes by value."""

    _fields_ = [("data", ctypes.c_byte * 128)]


class Library:
    """NCCL's functions; `symbols` has them by name."""

    def __init__(self, symbols: Any) -> None:
        def of(name: str, *kinds: Any, returns: Any = c_int) -> Any:
            function = getattr(symbols, name)
            function.argtypes, function.restype = kinds, returns
            return function

        message = c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p  # address, count, kind, rank, handle, stream
        self.get_identity = of("ncclGetUniqueId", POINTER(Identity))
        self.begin = of("ncclCommInitRank", POINTER(c_void_p), c_int, Identity, c_int)
        self.send, self.receive = of("ncclSend", *message), of("ncclRecv", *message)
        self.group_start, self.group_end = of("ncclGroupStart"), of("ncclGroupEnd")
        self.get_error = of("ncclCommGetAsyncError", c_void_p, POINTER(c_int))
        self.abort = of("ncclCommAbort", c_void_p)
        self.meaning = of("ncclGetErrorString", c_int, returns=c_char_p)
        self.last_words: Any = None
        with suppress(AttributeError):  # since 2.13
            self.last_words = of("ncclGetLastError", c_void_p, returns=c_char_p)

    @staticmethod
    @cache
    def found() -> Library | None:
        """The one that PyTorch has loaded; None where there is none, or it lacks a function."""
        for name in NAMES:
            with suppress(OSError, AttributeError):
                return Library(ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW))
        return None

    def identity(self) -> str:
        """Of a new communicator: one rank asks, and all begin with it."""
        made = Identity()
        self.check(self.get_identity(byref(made)))
        return bytes(made).hex()

    def check(self, result: int) -> None:
        """RuntimeError where a function has failed."""
        if result:
            told = [self.meaning(result), self.last_words(None) if self.last_words is not None else b""]
            raise RuntimeError("NCCL: " + ", ".join(x.decode(errors="replace").strip() for x in told if x))


class Communicator:
    """Of one group, with the GPU of each rank. Messages of one group, all on streams of one GPU, leave and come in the
    order of the calls. Made by all ranks together, with one rank's `Library.identity`, within so many seconds."""

    def __init__(self, library: Library, identity: str, rank: int, size: int, seconds: float = math.inf) -> None:
        self.nccl, self.handle, self.process = library, c_void_p(), os.getpid()
        self.in_graphs = False  # CUDA graphs have captured messages
        # Who asks for errors does so in another thread; and a collection of garbage may end the group while it does.
        self.lock = threading.RLock()
        _note_the_end()
        given = Identity.from_buffer_copy(bytes.fromhex(identity))
        try:
            self._settle(library.begin(byref(self.handle), size, given, rank), seconds)
        except RuntimeError:
            self.abort()
            raise

    def sender(self, count: int, to: int) -> Callable[[int, int], None]:
        """A function of a stream and an address: sends so many bytes from there."""
        return self._passer(self.nccl.send, count, to)

    def receiver(self, count: int, source: int) -> Callable[[int, int], None]:
        return self._passer(self.nccl.receive, count, source)

    def _passer(self, function: Any, count: int, other: int) -> Callable[[int, int], None]:
        handle = self.handle

        def passed(stream: int, address: int) -> None:
            result = function(address, count, BYTES, other, handle, stream)
            if result:
                self._settle(result)

        return passed

    def _settle(self, result: int, seconds: float = math.inf) -> None:
        """RuntimeError where a function has failed. One of a communicator that does not block may still be at it: what
        comes next on a stream must wait until its kernel is there."""
        until = time.monotonic() + seconds
        while result == IN_PROGRESS:
            if time.monotonic() > until:
                raise Late(f"NCCL: still in progress after {seconds:.1f} s")
            time.sleep(POLL)
            result = self._state()
        self.nccl.check(result)

    def _state(self) -> int:
        """What NCCL has found since, also in its own threads."""
        found = c_int()
        with self.lock:
            if not self.handle.value:
                raise RuntimeError("NCCL: the communicator has ended")
            return self.nccl.get_error(self.handle, byref(found)) or found.value

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent and received inside goes at once, so that two ranks may send to each other."""
        self.nccl.check(self.nccl.group_start())
        try:
            yield
        finally:
            result = self.nccl.group_end()
        self._settle(result)

    def error(self) -> str | None:
        """What has gone wrong since, in words."""
        with self.lock:
            result = self._state() if self.handle.value else 0
        try:
            self.nccl.check(0 if result == IN_PROGRESS else result)
        except RuntimeError as error:
            return str(error)
        return None

    def abort(self) -> None:
        """End it, once, with what is under way: kernels that wait for other ranks let go of their streams. In a thread
        of its own, because NCCL may wait: for the other ranks of the host, and for graphs that have captured messages,
        until they are no more."""
        with self.lock:
            handle, self.handle = self.handle, c_void_p()
        if handle.value and os.getpid() == self.process:
            with suppress(RuntimeError):
                in_time(lambda: self.nccl.abort(handle), ABORT_SECONDS)

    def ends(self) -> bool:
        """Whether it is to be ended with its group. Not where graphs have captured messages, which refer to it: it is
        left to them. Nor at the interpreter's end: the end of the process frees everything, and waits for nobody."""
        return bool(self.handle.value) and not self.in_graphs and not _ending


class Late(RuntimeError):
    """Something that did not end in time."""


def in_time(call: Callable[[], Any], seconds: float) -> Any:
    """What it returns, or raises. Late where it takes longer: it goes on in a thread that nobody waits for."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append((call(), None))
        except Exception as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, name="leetdist NCCL", daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise Late(f"NCCL: nothing came back in {seconds:.1f} s")
    result, error = ended[0]
    if error is not None:
        raise error
    return result


_ending = False


@cache
def _note_the_end() -> None:
    """Registered after, and so called before, what lets go of the groups at exit (leetdist.sequence.group)."""

    def end() -> None:
        global _ending
        _ending = True

    atexit.register(end)
