"""Point-to-point messages over torch.distributed: NCCL, gloo, or any other backend."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Hashable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from leetdist.sequence.mailbox import Gone, Mailbox, open_mailbox
from leetdist.sequence.symmetric import Inboxes, connect
from leetdist.sequence.transport import Message, Transport, timeout_seconds

# Seconds a failing rank waits for its neighbours to say whether they live, before it names the one it waited for.
ROLL_CALL_SECONDS = 2.0
# What hosts tell each other must not be taken for a tensor, nor the other way round, where ranks have lost step.
TENSORS, OBJECTS, HEADERS = 0, 1, 2
# Sends that a rank may be ahead of its neighbour by.
MOST_PENDING = 256

# What is under way: the tensor has to live until it has left.
Sent: TypeAlias = "tuple[dist.Work, Tensor, int, str]"


class PointToPoint(Transport):
    """Sends and receives of a process group."""

    def __init__(self, group: dist.ProcessGroup, wanted: str | None = None) -> None:
        """wanted: "auto", "p2p" or "symmetric"; see leetdist.sequence.symmetric.connect."""
        super().__init__()
        self.kind = "p2p"
        self.group, self.name = group, group.group_name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        backends = dist.get_backend_config(group)
        self.host_group: Any = group if "gloo" in backends else _companion(group)
        self.default_seconds = c10d.default_pg_timeout.total_seconds()
        with contextlib.suppress(AttributeError, RuntimeError):
            options: Any = getattr(self.host_group, "options", None)  # of gloo itself, or of a group that has it
            options = options or self.host_group._get_backend(torch.device("cpu")).options
            self.default_seconds = options._timeout.total_seconds()
        # gloo reads and writes host memory only.
        self.staged = "nccl" not in backends
        self.pending: list[Sent] = []
        self.captured: list[Sent] = []  # by a CUDA graph in the making, which may wait for nothing else
        if not self.staged:
            # NCCL connects a group in its first collective call, which every rank has to take part in.
            dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()), group=group)
        self.mailbox: Mailbox | None = None
        if self.size > 1:
            self.mailbox = open_mailbox(partial(self.gather_objects, what="where its host is"), self.rank, self.size)
        self.part_store: Store | None = None
        self.inboxes: Inboxes | None = None
        connect(self, wanted)

    def store(self, purpose: str) -> Store:
        return store_of(self.group, purpose)

    def part(self, ranks: list[int]) -> dist.ProcessGroup:
        """A process group of some of the ranks, made by them alone: a name, numbers and a store, by which PyTorch's
        symmetric memory finds them."""
        from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

        rank, size = ranks.index(self.rank), len(ranks)
        name: Any = f"leetdist/{self.name}/{ranks[0]}"
        store = self.part_store = Renumbered(self.store(f"part/{ranks[0]}"))  # C++ alone would not keep it alive
        group, kind = c10d.ProcessGroup(store, rank, size), c10d.ProcessGroup.BackendType.GLOO
        group._register_backend(torch.device("cpu"), kind, _gloo(self.group, store, rank, size))
        group._set_default_backend(kind)
        group._set_group_name(name)
        _register_process_group(name, group)
        with contextlib.suppress(RuntimeError):  # some versions of PyTorch look here
            _SymmetricMemory.set_group_info(name, rank, size, store)
        return group

    def send(self, tensor: Tensor, to: int, what: str) -> None:
        if tensor.numel():
            sent = self._send(self.group, self._outgoing(tensor), to, what, TENSORS)
            (self.captured if self._capturing() else self.pending).append(sent)

    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        if not tensor.numel():
            return tensor
        buffer = self._incoming(tensor)
        self._receive(self.group, buffer, source, what, TENSORS)
        return tensor if buffer is tensor else tensor.copy_(buffer)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], what: str) -> None:
        if self.staged:
            return super().exchange(outgoing, incoming, what)
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
            with self._blame(ops[0].group_peer, f"in an exchange of {what}"):
                for work in dist.batch_isend_irecv(ops):
                    self._wait(work)
        for tensor, buffer in filled:
            if buffer is not tensor:
                tensor.copy_(buffer)

    def reserve(self, size: int, device: torch.device) -> None:
        if self.inboxes is not None and device.type == "cuda":
            self.inboxes.reserve(size, device)

    def send_state(self, tensor: Tensor, to: int, what: str) -> None:
        if self.inboxes is None or not self.inboxes.serves(tensor, to):
            return self.send(tensor, to, what)
        self.inboxes.put(tensor, to)

    @contextlib.contextmanager
    def receive_state(self, shape: tuple[int, ...], like: Tensor, source: int, what: str) -> Iterator[Tensor]:
        if self.inboxes is None or not self.inboxes.serves(like, source):
            yield self.receive(like.new_empty(shape), source, what)
        else:
            with self.inboxes.taken(shape, like.dtype, source) as state:
                yield state

    def place(self) -> Hashable | None:
        return None if self.inboxes is None else self.inboxes.place()

    def flush(self) -> None:
        # A graph ends only when all that it began has ended.
        if self._capturing():
            captured, self.captured = self.captured, []
            return self._taken(captured)
        # What NCCL is given it also keeps (below): the stream need not wait until a neighbour has taken it.
        if not self.staged and len(self.pending) < MOST_PENDING:
            self.pending = [sent for sent in self.pending if not sent[0].is_completed()]
            return None
        pending, self.pending = self.pending, []
        return self._taken(pending)

    def _capturing(self) -> bool:
        return not self.staged and torch.cuda.is_current_stream_capturing()

    def gather_objects(self, mine: Any, what: str) -> list[Any]:
        # Lengths first, then bytes: two small messages to each rank, no collective, so that a rank that does not answer
        # is known by its number.
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        length = torch.tensor([data.numel()])
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
            everyone[rank] = pickle.loads(theirs)
        self._taken(sent)
        return everyone

    def largest(self, numbers: list[int], what: str) -> list[int]:
        if self.mailbox is None:
            return super().largest(numbers, what)
        try:
            everyone = self.mailbox.exchange(numbers, self.patience())
        except Gone as error:
            with self._blame(error.rank, f"for {what}"):
                raise
        return [max(each) for each in zip(*everyone, strict=True)]

    def patience(self) -> float:
        """Seconds that a host, or a GPU by itself, waits for another rank."""
        return self.seconds or self.default_seconds

    def swap_header(self, header: list[int], to: int, source: int, what: str) -> list[int]:
        mine = torch.tensor(header)
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
        with self._blame(to, f"to take {what}"):
            work = group.send([tensor], to, tag)
        return work, tensor, to, what

    def _taken(self, sent: list[Sent]) -> None:
        """Wait until these have left."""
        for work, _, to, what in sent:
            with self._blame(to, f"to take {what}"):
                self._wait(work)

    def _receive(self, group: Any, buffer: Tensor, source: int, what: str, tag: int) -> Tensor:
        with self._blame(source, f"for {what}"):
            self._wait(group.recv([buffer], source, tag))
        return buffer

    def _wait(self, work: dist.Work) -> None:
        """gloo: the host waits. NCCL: the current stream waits; the host too where a timeout is set, because only a
        host that waits can tell who it waited for (else NCCL's own watchdog ends the process)."""
        if self.seconds is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=self.seconds))

    @contextlib.contextmanager
    def _blame(self, other: int, what: str) -> Iterator[None]:
        """Turn a backend's error into one that names the rank that is gone."""
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - begin
            gone = self._roll_call(other)
            via = "" if gone == other else f" (which waits for rank {gone})"
            raise RuntimeError(
                f"leetdist: rank {gone} of {self.size} does not answer. Rank {self.rank} waited {waited:.1f} s "
                f"on rank {other}{via} {what}; it may have died or failed: see its own error. A slow rank can be "
                f"given more time with LEETDIST_TIMEOUT (seconds). Backend: {error}"
            ) from error

    def _roll_call(self, other: int) -> int:
        """The rank at the end of the chain of those who wait for each other.

        Every failing rank leaves a note of whom it waited for; whoever left none is the one that is gone.
        """
        with contextlib.suppress(RuntimeError, ValueError):  # the store may have gone with its rank
            store = PrefixStore(f"leetdist/{self.name}", _get_default_store())
            store.set(str(self.rank), str(other))
            seen = {self.rank}
            while other not in seen:
                seen.add(other)
                deadline = time.monotonic() + ROLL_CALL_SECONDS
                while not store.check([str(other)]):
                    if time.monotonic() > deadline:
                        return other
                    time.sleep(0.05)
                other = int(store.get(str(other)))
        return other


def store_of(group: dist.ProcessGroup, purpose: str) -> Store:
    """A store that the ranks of the group share, and nobody else writes into."""
    return PrefixStore(f"leetdist/{purpose}", c10d._get_process_group_store(group))


def _companion(group: dist.ProcessGroup) -> Any:
    """Gloo between the same ranks, for what the hosts must agree on (a GPU backend would stop the stream).

    Not by dist.new_group: its names count the groups that a rank knows, and ranks that are in different numbers of
    groups would wait for each other under different names for ever.
    """
    return _gloo(group, store_of(group, "host"), dist.get_rank(group), dist.get_world_size(group))


def _gloo(like: dist.ProcessGroup, store: Store, rank: int, size: int) -> Any:
    """With the timeout of `like`."""
    seconds = timeout_seconds()
    timeout = c10d.default_pg_timeout if seconds is None else timedelta(seconds=seconds)
    with contextlib.suppress(RuntimeError, AttributeError):
        options: Any = like._get_backend(torch.device("cuda")).options
        timeout = options._timeout if seconds is None else timeout
    return c10d.ProcessGroupGloo(store, rank, size, timeout)


class Renumbered(Store):
    """A store for PyTorch's symmetric memory, whose keys end in "/exchange/rank".

    It counts the exchanges of a process over all groups, so ranks that are in different numbers of groups would wait
    for each other under different numbers for ever (seen with PyTorch 2.11). Here every store counts its own.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.numbers: dict[str, int] = {}

    def _key(self, key: str) -> str:
        exchange, _, rank = key.rpartition("/")
        if not (rank.isdigit() and exchange.rpartition("/")[2].isdigit()):
            return key
        return f"exchange/{self.numbers.setdefault(exchange, len(self.numbers))}/{rank}"

    def set(self, key: str, value: Any) -> None:
        self.store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self.store.get(self._key(key))

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self.store.wait([self._key(key) for key in keys], *timeout)

    def check(self, keys: list[str]) -> bool:
        return self.store.check([self._key(key) for key in keys])

    def add(self, key: str, amount: int) -> int:
        return self.store.add(key, amount)
