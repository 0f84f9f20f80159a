"""Point-to-point messages over torch.distributed: NCCL, gloo, or any other backend."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Hashable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from leetdist.kernels.runtime import recording
from leetdist.sequence import memory
from leetdist.sequence.blame import ByStore, OnBoard, Verdict, judge
from leetdist.sequence.board import Board
from leetdist.sequence.direct import Direct, connect
from leetdist.sequence.encoding import decode, encode
from leetdist.sequence.ledger import Ledger
from leetdist.sequence.mailbox import Gone, Mailbox
from leetdist.sequence.timeouts import limited, timeout_of
from leetdist.sequence.transport import Message, Transport, Unanswered, timeout_seconds

# What hosts tell each other must not be taken for a tensor, nor the other way round, where ranks have lost step.
TENSORS, OBJECTS, HEADERS = 0, 1, 2
# Sends that a rank may be ahead of its neighbour by.
MOST_PENDING = 256

# What is under way: the tensor has to live until it has left.
Sent: TypeAlias = "tuple[dist.Work, Tensor, int, str]"


class PointToPoint(Transport):
    """Sends and receives of a process group."""

    kind = "p2p"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.name = group.group_name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # A group that is destroyed ends, with its threads and sockets: nothing here keeps it.
        self._group = weakref.ref(group)
        backends = dist.get_backend_config(group)
        self.companion = None if "gloo" in backends else _companion(group)
        self.default_seconds = timeout_of(self.host_group).total_seconds()
        # gloo reads and writes host memory only.
        self.staged = "nccl" not in backends
        if not self.staged:
            _make_current(getattr(group, "bound_device_id", None))
        self.pending: list[Sent] = []
        self.captured: list[Sent] = []  # by a CUDA graph in the making, which may wait for nothing else
        self.mailbox: Mailbox | None = None
        self.ledger: Ledger | None = None
        self.direct: Direct | None = None
        self.processes: list[memory.Process] = []
        with self.call("set-up"):
            if not self.staged:
                # NCCL connects a group in its first collective call, which every rank has to take part in.
                dist.all_reduce(torch.zeros(1, device=self.device), group=group)
            if self.size > 1:
                self._share_memory()

    def _share_memory(self) -> None:
        """A mailbox, a ledger and a board that all ranks see, where they are on one host."""
        letters, calls, boards = Mailbox.bytes(self.size), Ledger.bytes(self.size), Board.bytes(self.size)
        gather = partial(self.gather_objects, what="where its host is")
        shared, processes = memory.shared(gather, self.rank, letters + calls + boards)
        if shared is not None:
            self.processes = processes
            self.mailbox = Mailbox(shared[:letters], self.rank, processes)
            self.ledger = Ledger(shared[letters : letters + calls], self.rank, self.size)
            self.board = Board(shared[letters + calls :], self.rank)
            self.board.begin("set-up")

    def take_nccl(self) -> None:
        """Tensors on GPUs go by NCCL's own calls from now on, where all ranks can; they call this together."""
        if not self.staged and self.size > 1:
            with self.call("set-up"):
                self.direct = connect(self, self.device)

    @property
    def device(self) -> torch.device:
        """The GPU that the group is bound to (init_process_group's device_id), else the current one. Where both are
        told, the first use of the group has made them one."""
        bound: torch.device | None = getattr(self.group, "bound_device_id", None)
        return bound or torch.device("cuda", torch.cuda.current_device())

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError(f"leetdist: the process group that served this call ({self.name!r}) has been destroyed")
        return group

    @property
    def carrier(self) -> str:
        return self.kind if self.direct is None else f"{self.kind} (NCCL's own calls)"

    @property
    def host_group(self) -> Any:
        return self.companion or self.group

    def close(self) -> None:
        super().close()
        if self.direct is not None:
            self.direct.close()
        self.companion = self.mailbox = self.ledger = self.direct = None
        self.pending, self.captured = [], []

    def send(self, tensor: Tensor, to: int, what: str) -> None:
        if not tensor.numel():
            return
        if self.direct is not None and self.direct.serves(tensor):
            recording.refuse()
            self.direct.send(tensor, to, what)
        else:
            sent = self._send(self.group, self._outgoing(tensor), to, what, TENSORS)
            (self.captured if self.capturing() else self.pending).append(sent)

    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        if not tensor.numel():
            return tensor
        buffer = self._incoming(tensor)
        if self.direct is not None and self.direct.serves(tensor):
            recording.refuse()
            self.direct.receive(buffer, source, what)
        else:
            self._receive(self.group, buffer, source, what, TENSORS)
        return tensor if buffer is tensor else tensor.copy_(buffer)

    def send_state(self, tensor: Tensor, to: int, what: str) -> None:
        """By NCCL, the stream waits until it has left: NCCL's kernel takes most of a multiprocessor, and the blocks of
        what follows would take every place that comes free before it."""
        direct = self.direct is not None and self.direct.serves(tensor)

        def step(tensor: Tensor) -> None:
            self.send(tensor, to, what)
            if not direct and not self.staged and tensor.numel():
                (self.captured if self.capturing() else self.pending)[-1][0].wait()

        if self.direct is not None and direct and tensor.numel() and tensor.is_contiguous():
            self.direct.send(tensor, to, what)
        else:
            recording.take_with(step, tensor)

    @contextlib.contextmanager
    def receive_state(self, shape: tuple[int, ...], like: Tensor, source: int, what: str) -> Iterator[Tensor]:
        if self.direct is None or not self.direct.serves(like):
            with super().receive_state(shape, like, source, what) as state:
                yield state
            return
        state = like.new_empty(shape)
        if state.numel():
            self.direct.receive(state, source, what)
        yield state

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], what: str) -> None:
        if self.staged:
            return super().exchange(outgoing, incoming, what)
        if self.direct is not None and all(self.direct.serves(x) for x, _ in (*outgoing, *incoming)):
            recording.refuse()
            return self.direct.exchange(outgoing, incoming, what)
        # Two ranks that both send first, each waiting for the other to receive, would wait forever on NCCL, whose
        # sends are in line with its receives: it has to be told of all of them at once.
        ops, filled = [], []
        for tensor, to in outgoing:
            if tensor.numel():
                ops.append(dist.P2POp(dist.isend, self._outgoing(tensor), group=self.group, group_peer=to))
        for tensor, source in incoming:
            if tensor.numel():
                filled.append((tensor, self._incoming(tensor)))
                ops.append(dist.P2POp(dist.irecv, filled[-1][1], group=self.group, group_peer=source))
        if ops:
            with self.blame(ops[0].group_peer, f"in an exchange of {what}"):
                for work in dist.batch_isend_irecv(ops):
                    self._wait(work)
        for tensor, buffer in filled:
            if buffer is not tensor:
                tensor.copy_(buffer)

    def flush(self) -> None:
        if not self.pending and not self.captured:
            return None
        # A graph ends only when all that it began has ended.
        if self.capturing():
            captured, self.captured = self.captured, []
            return self._taken(captured)
        # What NCCL is given it also keeps (below): the stream need not wait until a neighbour has taken it.
        if not self.staged and len(self.pending) < MOST_PENDING:
            # They leave in order, more or less, and each question takes the host a microsecond or two.
            waiting = (n for n, sent in enumerate(self.pending) if not sent[0].is_completed())
            del self.pending[: next(waiting, len(self.pending))]
            return None
        pending, self.pending = self.pending, []
        return self._taken(pending)

    def place(self) -> Hashable | None:
        return None if self.staged else ()

    def capturing(self) -> bool:
        return not self.staged and torch.cuda.is_current_stream_capturing()

    def swap_objects(self, mine: tuple[str, Any], what: str) -> list[tuple[str, Any]]:
        # Lengths first, then bytes: two small messages to each rank, no collective, so that a rank that does not answer
        # is known by its number.
        data = torch.frombuffer(bytearray(encode(mine)), dtype=torch.uint8)
        length = torch.tensor([data.numel()], dtype=torch.int64, device="cpu")
        sent = [
            self._send(self.host_group, message, rank, what, OBJECTS)
            for rank in self.others()
            for message in (length, data)
        ]
        everyone = [mine] * self.size
        for rank in self.others():
            size = self._receive(self.host_group, torch.zeros_like(length), rank, what, OBJECTS)
            theirs = bytearray(int(size))  # and no numpy, which PyTorch does without
            self._receive(self.host_group, torch.frombuffer(theirs, dtype=torch.uint8), rank, what, OBJECTS)
            everyone[rank] = decode(theirs)
        self._taken(sent)
        return everyone

    def alike(self, number: int, what: str) -> bool:
        if self.mailbox is None:
            return super().alike(number, what)
        try:
            return self.mailbox.alike(number, self.patience(), self.board, f"for {what}")
        except Gone as error:
            raise self.unanswered(error.rank, f"for {what}", error.seconds, error) from error

    def tell(self, number: int) -> int | None:
        return None if self.ledger is None else self.ledger.tell(number)

    def patience(self) -> float:
        """Seconds that a host, or a GPU by itself, waits for another rank."""
        return self.seconds or self.default_seconds

    def swap_header(self, header: list[int], to: int, source: int, what: str) -> list[int]:
        mine = torch.tensor(header, dtype=torch.int64, device="cpu")
        sent = self._send(self.host_group, mine, to, what, HEADERS)
        theirs: list[int] = self._receive(self.host_group, torch.zeros_like(mine), source, what, HEADERS).tolist()
        self._taken([sent])
        return theirs

    def _outgoing(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return tensor.cpu() if self.staged else tensor

    def _incoming(self, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous() and not (self.staged and tensor.is_cuda):
            return tensor
        device = torch.device("cpu") if self.staged else tensor.device
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def _send(self, group: Any, tensor: Tensor, to: int, what: str, tag: int) -> Sent:
        with self.blame(to, f"to take {what}"):
            work = group.send([tensor], to, tag)
        return work, tensor, to, what

    def _taken(self, sent: list[Sent]) -> None:
        """Wait until these have left."""
        for work, tensor, to, what in sent:
            with self.blame(to, f"to take {what}"):
                self._wait(work, on_host=tensor.is_cpu)

    def _receive(self, group: Any, buffer: Tensor, source: int, what: str, tag: int) -> Tensor:
        with self.blame(source, f"for {what}"):
            self._wait(group.recv([buffer], source, tag), on_host=buffer.is_cpu)
        return buffer

    def _wait(self, work: dist.Work, *, on_host: bool = False) -> None:
        """gloo: the host waits. NCCL: the current stream waits; the host too where a timeout is set, because only a
        host that waits can tell who it waited for (else NCCL's own watchdog ends the process)."""
        seconds = self.patience() if on_host else self.seconds  # gloo's messages do not follow its group's timeout
        if seconds is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=seconds))

    @contextlib.contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Around one of the process group's own collective calls, whose errors name nobody."""
        with self.call("exchange"):
            begin = time.monotonic()
            try:
                with limited(self.group, self.seconds if self.staged else None):
                    yield
            except RuntimeError as error:
                waited = time.monotonic() - begin
                raise self.unanswered(self._absent(), f"for {what}", waited, error) from error

    def _absent(self) -> int:
        """A rank that is not in a collective call with this one, as far as the others can see; else a neighbour."""
        for rank in self.others() if self.processes else ():
            if self.processes[rank].state() != "runs" or self.board.read(rank).phase != "exchange":
                return rank
        return (self.rank + 1) % self.size

    @contextlib.contextmanager
    def blame(self, other: int, what: str) -> Iterator[None]:
        """Turn a backend's error into one that names the rank at fault. other: whom this rank waits for."""
        begin = time.monotonic()
        self.board.wait(other, what)
        try:
            yield
        except Unanswered:
            raise
        except RuntimeError as error:
            raise self.unanswered(other, what, time.monotonic() - begin, error) from error
        self.board.go_on()

    def unanswered(self, other: int, what: str, waited: float, error: RuntimeError) -> Unanswered:
        """The error to raise. What is under way by NCCL is given up: else the program would wait for its GPU."""
        if self.direct is not None:
            self.direct.watch.stop()
        found = self.fault(other, what, waited, error)
        if self.direct is not None:
            self.direct.give_up()
        return found

    def fault(self, other: int, what: str, waited: float, error: RuntimeError) -> Unanswered:
        """Who does not answer, in words."""
        total = max(waited, time.monotonic() - self.began)
        verdict = self._verdict(other, closed=waited < 0.9 * self.patience())
        via = f" (which waits for rank {verdict.chain[2]})" if len(verdict.chain) > 2 else ""
        if len(verdict.chain) == 2 and verdict.rank != other:
            via = f" (which waits for rank {verdict.rank})"
        fault = f"rank {verdict.rank} of {self.size} does not answer"
        if verdict.rank == self.rank:
            fault = f"rank {self.rank} of {self.size}, this one, has lost step with the others"
        return Unanswered(
            f"leetdist: {fault}: {verdict.known}. Rank {self.rank} waited {waited:.1f} s on rank {other}{via} {what}, "
            f"{total:.1f} s since its call began. A slow rank can be given more time with LEETDIST_TIMEOUT (seconds). "
            f"Backend: {error}",
            verdict.rank,
        )

    def _verdict(self, other: int, *, closed: bool) -> Verdict:
        if self.processes:
            return judge(self.rank, other, self.size, OnBoard(self.board, self.processes), closed=closed)
        look = ByStore(store_of(self.group, "roll call"), self.board, self.rank, other)
        verdict = judge(self.rank, other, self.size, look, closed=closed)
        host = self._store_host()
        if not look.reached and host is not None:
            return Verdict(host, "it keeps the store of the job, which does not answer either", (self.rank, other))
        return verdict

    def _store_host(self) -> int | None:
        """The rank whose process keeps the store through which ranks find each other, if one of the group does."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return None
        ranks = dist.get_process_group_ranks(self.group)
        return ranks.index(0) if 0 in ranks else None


def store_of(group: dist.ProcessGroup, purpose: str) -> Store:
    """A store that the ranks of the group share, and nobody else writes into."""
    return PrefixStore(f"leetdist/{purpose}", c10d._get_process_group_store(group))


def _companion(group: dist.ProcessGroup) -> Any:
    """Gloo between the same ranks, for what the hosts must agree on (a GPU backend would stop the stream).

    Not by dist.new_group: its names count the groups that a rank knows, and ranks that are in different numbers of
    groups would wait for each other under different names for ever.
    """
    return gloo(group, store_of(group, "host"), dist.get_rank(group), dist.get_world_size(group))


def _make_current(bound: torch.device | None) -> None:
    """A group's GPU is the current one: what PyTorch, NCCL and graphs take from there must not be another's."""
    if bound is not None and bound.type == "cuda" and bound.index != torch.cuda.current_device():
        torch.cuda.set_device(bound)


def gloo(like: dist.ProcessGroup, store: Store, rank: int, size: int) -> Any:
    """With the timeout of `like`."""
    seconds = timeout_seconds()
    timeout = timeout_of(like, "cuda") if seconds is None else timedelta(seconds=seconds)
    return c10d.ProcessGroupGloo(store, rank, size, timeout)
