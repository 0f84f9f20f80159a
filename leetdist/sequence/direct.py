"""Messages of a process group by NCCL's own calls, instead of the group's: what leetdist.sequence.p2p takes for tensors
on GPUs, where every rank can.

They are on the current stream, which waits until they have left or come, so memory is used again in its order and
nothing is kept for them. A host waits only where a timeout is set, because only a host that waits can raise; else
leetdist.sequence.watch ends the process when it is time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from leetdist.kernels.runtime import recording
from leetdist.sequence.board import Activity
from leetdist.sequence.nccl import Communicator, Late, Library, in_time
from leetdist.sequence.transport import Message
from leetdist.sequence.watch import Watch, record

Passed: TypeAlias = "Callable[[int, int], None]"  # given a stream and an address

AWAKE = 2e-3  # seconds that a host waits without sleeping
CLOSE_SECONDS = 5.0
GRACE = 2.0  # seconds more than a host waits: what it can raise comes first


class Direct:
    """The messages of one transport (leetdist.sequence.p2p.PointToPoint, which makes it)."""

    def __init__(self, transport: Any, communicator: Communicator, device: torch.device) -> None:
        self.transport, self.communicator, self.device = transport, communicator, device
        self.connected: set[int] = set()  # ranks that something was sent to; ~rank where something came from
        self.said: Activity | None = None  # whom the stream waits for, to the other ranks
        self.watch = Watch(self)

    def serves(self, x: Tensor) -> bool:
        """Whether x is on the GPU. A group may have another backend for tensors elsewhere."""
        if x.device.type == self.device.type and x.device != self.device:
            raise ValueError(
                f"leetdist: rank {self.transport.rank} has tensors on {x.device}, and its group was first used with "
                f"{self.device}: give init_process_group device_id=torch.device({str(x.device)!r}), or call "
                f"torch.cuda.set_device({x.device.index}) before that"
            )
        return x.device == self.device

    def send(self, x: Tensor, to: int, what: str) -> None:
        x = in_memory(x)
        recording.call_library(self.sending(x.nbytes, to, what), x)

    def receive(self, x: Tensor, source: int, what: str) -> None:
        """Into x, which is contiguous."""
        recording.call_library(self.receiving(x.nbytes, source, what), x)

    def sending(self, count: int, to: int, what: str) -> Passed:
        """A function that sends so many bytes."""
        return self._noted(self.communicator.sender(count, to), to, f"to take {what}", sent=count)

    def receiving(self, count: int, source: int, what: str) -> Passed:
        """The same for what comes; the host waits for it where a timeout is set."""
        told, transport = f"for {what}", self.transport
        passed = self._noted(self.communicator.receiver(count, source), source, told)

        def received(stream: int, address: int) -> None:
            passed(stream, address)
            if transport.seconds is not None:
                self.wait(source, told)

        return received

    def _noted(self, passed: Passed, other: int, told: str, sent: int = 0) -> Passed:
        transport, connected, way, message = self.transport, self.connected, other if sent else ~other, {told: other}

        def noted(stream: int, address: int) -> None:
            transport.bytes_sent += sent
            if way in connected:
                try:
                    passed(stream, address)
                except RuntimeError as error:
                    raise transport.unanswered(other, told, 0.0, error) from error
            else:
                with transport.blame(other, told):
                    self._first({way}, partial(passed, stream, address))
            self.note(message)

        return noted

    def _first(self, ways: set[int], call: Callable[[], Any]) -> None:
        """A call with messages to these ranks, and from those of which ~rank is told: NCCL connects two ranks in their
        first message each way, for which hosts wait."""
        if self.connected.issuperset(ways) or self.transport.capturing():
            call()
        else:
            _in_time(call, self.device, self.transport)
            self.connected |= ways

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], what: str) -> None:
        """As leetdist.sequence.transport.Transport.exchange."""
        sent = [(in_memory(x), to) for x, to in outgoing if x.numel()]
        filled = [(x, source) for x, source in incoming if x.numel()]
        buffers = [x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, _ in filled]
        ways = {to for _, to in sent} | {~source for _, source in filled}
        others = [max(way, ~way) for way in ways]
        if not ways:
            return
        told, stream = f"in an exchange of {what}", _stream(self.device)

        def passed() -> None:
            with self.communicator.together():
                for x, to in sent:
                    self.communicator.sender(x.nbytes, to)(stream, x.data_ptr())
                for (_, source), buffer in zip(filled, buffers, strict=True):
                    self.communicator.receiver(buffer.nbytes, source)(stream, buffer.data_ptr())

        self.transport.bytes_sent += sum(x.nbytes for x, _ in sent)
        with self.transport.blame(others[0], told):
            self._first(ways, passed)
        self.note({f"{told} with rank {other}": other for other in others})
        if self.transport.seconds is not None:
            self.wait(others[0], told)
        for (x, _), buffer in zip(filled, buffers, strict=True):
            if buffer is not x:
                x.copy_(buffer)

    def greet(self) -> None:
        """Connect to the neighbours, before a pass has to."""
        rank, swapped = self.transport.rank, torch.zeros(2, dtype=torch.uint8, device=self.device)
        neighbours = sorted({rank - 1, rank + 1} & set(self.transport.others()))
        self.exchange([(swapped[:1], x) for x in neighbours], [(swapped[1:], x) for x in neighbours], "a greeting")

    def note(self, messages: dict[str, int]) -> None:
        """These are on the current stream now: somebody has to watch them."""
        if self.transport.capturing():  # nobody can look at a graph's events
            self.communicator.in_graphs = True
        else:
            self.watch.note(messages)

    def wait(self, other: int, told: str) -> None:
        """The host waits for the stream. RuntimeError where that takes longer than the timeout."""
        transport = self.transport
        if transport.capturing():
            return
        event, begin = torch.cuda.Event(), time.monotonic()
        record(event, self.device)
        with transport.blame(other, told):
            while not event.query():
                seconds = time.monotonic() - begin
                if seconds < AWAKE:
                    continue
                cause = self.broken() if seconds < transport.seconds else f"NCCL: nothing in {seconds:.1f} s"
                if cause is not None:
                    other, told = self._suspect({told: other, **self.watch.messages()})
                    raise transport.unanswered(other, told, seconds, RuntimeError(cause))
                time.sleep(AWAKE / 10)

    def _suspect(self, messages: dict[str, int]) -> tuple[int, str]:
        """Of these, behind one event, which is it that does not come? That of a rank whose process has ended or is
        stopped, or else of the one that is furthest behind; the first of several."""
        transport = self.transport

        def passes(rank: int) -> int:
            if not transport.processes:  # on several hosts: nobody knows
                return 0
            did = transport.board.read(rank)
            return did.forward + did.backward if transport.processes[rank].state() == "runs" else -1

        told, other = min(messages.items(), key=lambda message: passes(message[1]))
        return other, told

    def limit(self) -> float:
        return max(self.transport.default_seconds, self.transport.seconds or 0.0) + GRACE

    def say_waits(self, messages: dict[str, int]) -> None:
        board = self.transport.board
        if board.mine().other < 0:
            board.wait(*self._suspect(messages))
            self.said = board.mine()

    def say_goes_on(self) -> None:
        board = self.transport.board
        now, said = board.mine(), self.said
        if said is not None and (now.other, now.what) == (said.other, said.what):  # else the host waits, since then
            board.go_on()

    def broken(self) -> str | None:
        return self.communicator.error()

    def verdict(self, messages: dict[str, int], seconds: float, cause: str) -> str:
        return str(self.transport.fault(*self._suspect(messages), seconds, RuntimeError(cause)))

    def give_up(self) -> None:
        """What is under way never ends, and an error tells of it: nobody is to end the process."""
        self.watch.stop()
        self.communicator.abort()

    def close(self) -> None:
        """Messages that are under way have some seconds."""
        if os.getpid() != self.communicator.process:
            return
        self.watch.stop()
        if not self.communicator.ends():
            return
        until = time.monotonic() + CLOSE_SECONDS
        with suppress(RuntimeError):
            for mark in (self.watch.watched, self.watch.newest):
                while mark is not None and mark.since and not mark.event.query() and time.monotonic() < until:
                    time.sleep(AWAKE)
        self.communicator.abort()


def connect(transport: Any, device: torch.device) -> Direct | None:
    """For the ranks of a transport, each with its GPU; None where one of them cannot. They call this together and come
    to the same end."""
    library, identity = Library.found(), ""
    if library is not None and transport.rank == 0:
        with suppress(RuntimeError):
            identity = library.identity()
    everyone = transport.gather_objects((library is not None, identity), "whether it has NCCL")
    identity = everyone[0][1]
    if library is None or not identity or not all(has for has, _ in everyone):
        return None
    made: Any = None
    obstacle = ""
    with transport.blame((transport.rank + 1) % transport.size, "to begin with NCCL"):
        try:
            make = partial(Communicator, library, identity, transport.rank, transport.size, transport.patience())
            made = _in_time(make, device, transport)
        except Late:
            raise
        except RuntimeError as error:
            obstacle = str(error)
    direct = None if made is None else Direct(transport, made, device)
    greeted = False
    try:
        if not any(transport.gather_objects(obstacle, "whether NCCL has begun")) and direct is not None:
            direct.greet()
            greeted = True
    finally:
        if direct is not None and not greeted:
            direct.give_up()
    return direct if greeted else None


def in_memory(x: Tensor) -> Tensor:
    """With its numbers in memory, in a row: not those of which a bit says that they are to be negated, say."""
    x = x.detach()
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    return x.contiguous()


def _in_time(call: Callable[[], Any], device: torch.device, transport: Any) -> Any:
    """In a thread, which has a GPU of its own, for as long as a rank may take."""

    def called() -> Any:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return call()

    return in_time(called, transport.patience())


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
