"""How ranks talk: the interface, what every implementation shares, and how a failure is told.

Ranks are ranks of the group, never of the world. Every wait ends: with what was waited for, or with a RuntimeError that
names the rank that did not answer.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from leetdist.kernels.runtime import recording
from leetdist.kernels.runtime.memo import Memo
from leetdist.sequence.board import LEFT, Board

if TYPE_CHECKING:
    from leetdist.kernels.common.hop import Hop

Message: TypeAlias = "tuple[Tensor, int]"  # a tensor, and the rank it goes to or comes from


KINDS = 512  # of calls that are remembered
MOST_SECONDS = 1e9  # of a timeout, 31 years: a thread's wait overflows at nine times as many


class Unanswered(RuntimeError):
    """A wait that ended in vain; `rank` is at fault."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Transport(ABC):
    """Messages between the ranks of one group, in order between any two ranks."""

    kind: str
    name: str  # unique in this process; what compiled graphs know the group by
    rank: int
    size: int

    def __init__(self) -> None:
        self.seconds = timeout_seconds()
        self.failure: str | None = None
        self.agreements: Memo[Any, Any] = Memo(2 * KINDS)  # by one rank's arguments, and by those and promised lengths
        self.agreed = 0  # how many of them all ranks have made
        self.plans: Memo[Any, Any] = Memo(KINDS)  # of the engine, by kind of call
        self.sites: dict[int, int] = {}  # lines in which ranks made one call, and were told of: the number of one
        self.cut: tuple[int, int] | None = None
        self.streams: dict[torch.device, torch.cuda.Stream] = {}  # where this rank's scans run
        self.bytes_sent = 0  # of tensors, not of what the hosts agree on
        self.board = Board.alone()
        self.began = 0.0  # the call under way
        self.depth = 0
        self.process = os.getpid()
        self.lock = threading.RLock()

    @property
    def carrier(self) -> str:
        """The kind, and what it goes by, for users."""
        return self.kind

    @abstractmethod
    def send(self, tensor: Tensor, to: int, what: str) -> None:
        """Start sending; `flush` waits for it. The tensor must not change until then."""

    @abstractmethod
    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        """Fill `tensor` with what `source` sends, and return it."""

    @abstractmethod
    def flush(self) -> None:
        """After this, what was sent may change."""

    def gather_objects(self, mine: Any, what: str, *, fails: bool = False) -> list[Any]:
        """Every rank's object, on every rank, over the host. ValueError, on every rank, where one asks for another
        `what`: in another call an object has another meaning. fails: mine tells of an error, and so to all that ask."""
        everyone = self.swap_objects(("" if fails else what, mine), what)
        for rank, (theirs, _) in enumerate(everyone):
            if not fails and theirs not in ("", what):
                raise ValueError(
                    f"rank {rank} of {self.size} makes another call of the group: it asks for {theirs!r}, and rank "
                    f"{self.rank} for {what!r}"
                )
        return [theirs for _, theirs in everyone]

    @abstractmethod
    def swap_objects(self, mine: tuple[str, Any], what: str) -> list[tuple[str, Any]]:
        """Send an object to every other rank and take theirs, over the host; in rank order."""

    def alike(self, number: int, what: str) -> bool:
        """Whether all ranks have come with this number; the same answer on every rank, over the host.

        By dissemination: after step s, a rank knows the extremes of about 2^(s+1) ranks.
        """
        extremes, step = [number, -number], 1
        while step < self.size:
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            theirs = self.swap_header(extremes, to, source, what)
            extremes = [max(a, b) for a, b in zip(extremes, theirs, strict=True)]
            step *= 2
        return extremes[0] == -extremes[1]

    def tell(self, number: int) -> int | None:
        """Leave this rank's number of its next call where the others can see it, and return a rank that has left
        another for one of the calls so far; None where none is seen, or nothing can be. Nobody waits."""
        return None

    @abstractmethod
    def swap_header(self, header: list[int], to: int, source: int, what: str) -> list[int]:
        """Send a few numbers to one rank and take as many from another, over the host."""

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], what: str) -> None:
        """All sends and receives at once, so that two ranks may send to each other; the receives are done after."""
        for tensor, rank in outgoing:
            self.send(tensor, rank, what)
        for tensor, rank in incoming:
            self.receive(tensor, rank, what)

    def reserve(self, size: int, device: torch.device) -> None:
        """Make room for a scan's messages of `size` bytes; all ranks call it together, when they agree on a shape."""
        return  # most transports need none

    def send_state(self, tensor: Tensor, to: int, what: str) -> None:
        """`send` to a neighbour in the scan."""
        recording.take_with(lambda tensor: self.send(tensor, to, what), tensor)

    @contextmanager
    def receive_state(self, shape: tuple[int, ...], like: Tensor, source: int, what: str) -> Iterator[Tensor]:
        """What a neighbour in the scan sends, of a shape, on the device and in the dtype of `like`; valid inside."""
        state = like.new_empty(shape)
        recording.take_with(lambda tensor: self.receive(tensor, source, what), state)
        yield state

    def hop(self, shape: tuple[int, ...], like: Tensor, source: int | None, to: int | None) -> Hop | None:
        """For a fold that takes what one neighbour sends, and hands its end on to the other, by itself, where there are
        such (states of a shape, as `like`); None if this is for `receive_state` and `send_state`."""
        return None

    def place(self) -> Hashable | None:
        """What decides where a scan's next states go and come, if launches and steps of the host move them that can be
        repeated (leetdist.kernels.runtime.replay); None if it takes more, as where a host waits for the GPU."""
        return None

    def note_cut(self, local: int, whole: int) -> None:
        """shard_sequence made a shard of `local` tokens from `whole`."""
        self.cut = local, whole

    def cut_from(self, local: int) -> int | None:
        """How long the sequence was that the last shard, if it has `local` tokens, was cut from. Ranks compare that
        where they agree on a call, because shards of different sequences may fit together by their lengths."""
        return self.cut[1] if self.cut is not None and self.cut[0] == local else None

    def make_room(self) -> None:
        """Before every new agreement, which all ranks make together: so all forget the same ones, at the same time. A
        rank that still knew what another has forgotten would not wait for it where lengths are promised."""
        self.agreed += 1
        if self.agreed % KINDS == 0:
            self.agreements.clear()
            self.plans.clear()

    def others(self) -> Iterator[int]:
        return (rank for rank in range(self.size) if rank != self.rank)

    def close(self) -> None:
        """Let go of everything: the group ends. The other ranks see that this one has left."""
        if self.failure is None:
            self.failure = "the group was destroyed"
            if os.getpid() == self.process:  # a child that ends has no say on its parent's board
                self.board.end(LEFT)
        replay = sys.modules.get("leetdist.kernels.runtime.replay")  # which needs Triton
        if replay is not None and os.getpid() == self.process:
            replay.forget(self)
        self.board = Board.alone()
        self.agreements.clear()  # what is remembered with them holds this transport
        self.plans.clear()
        self.streams.clear()

    def call(self, phase: str) -> AbstractContextManager[None]:
        """Around every use of the group, of one of leetdist.sequence.board.PHASES. A call that fails in the middle
        leaves messages that the next call would take for its own: no later call may use the group."""
        return _Call(self, phase)

    def collective(self, what: str) -> AbstractContextManager[None]:
        """Around a collective call of torch.distributed between the ranks of this group."""
        return self.call("exchange")

    def enter(self, phase: str) -> None:
        """What `call` begins with."""
        if os.getpid() != self.process:
            raise RuntimeError(
                f"leetdist: this process was forked from rank {self.rank} of the group, whose connections are its "
                f"parent's: set up a process group of the children's own, or start them by spawn"
            )
        if self.failure is not None:
            raise RuntimeError(
                f"leetdist: an earlier call on this group failed on rank {self.rank} ({self.failure}), and messages of "
                f"it may still be under way. Make a new group"
            )
        if not self.lock.acquire(blocking=False):
            # The other ranks may take the two calls in another order, and then for each other.
            self.failure = "RuntimeError: two threads called it at the same time"
            raise RuntimeError(
                f"leetdist: two threads of rank {self.rank} use one group at the same time; its calls must come in the "
                f"same order on every rank: give each thread a group of its own, or make the calls in one thread"
            )
        self.depth += 1
        if self.depth == 1:
            self.began = time.monotonic()
            self.board.begin(phase)


class _Call:
    """`Transport.call`; a class, because a generator takes the host another microsecond."""

    __slots__ = ("phase", "transport")

    def __init__(self, transport: Transport, phase: str) -> None:
        self.transport, self.phase = transport, phase

    def __enter__(self) -> None:
        self.transport.enter(self.phase)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        transport = self.transport
        if error is not None:
            transport.failure = f"{type(error).__name__}: {error}"[:500]
            transport.board.fail(error.rank if isinstance(error, Unanswered) else -1, transport.failure)
        elif transport.depth == 1:
            transport.board.end()
        transport.depth -= 1
        transport.lock.release()


def timeout_seconds() -> float | None:
    """LEETDIST_TIMEOUT, or None for the process group's own."""
    value = os.environ.get("LEETDIST_TIMEOUT")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"LEETDIST_TIMEOUT must be a positive number of seconds, got {value!r}")
    return check_seconds("LEETDIST_TIMEOUT", seconds)


def check_seconds(name: str, seconds: float) -> float:
    """The seconds; ValueError where they are more than waits of the system can be told."""
    if seconds > MOST_SECONDS:
        raise ValueError(f"{name} must be at most {MOST_SECONDS:,.0f} seconds, got {seconds}")
    return seconds
