"""Symmetric memory of the ranks that share a node: every rank's inbox, mapped into every other rank of the node.

Each directed link has SLOTS slots with two sets of flags each: "full", raised by the sender, and "free", by the
receiver. A slot is written only after "free" (up when the inboxes are made) and read only after "full", so a rank may
be SLOTS messages ahead of its neighbour.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import Store

from leetdist.kernels.runtime import recording
from leetdist.kernels.runtime.memo import Memo
from leetdist.sequence.p2p import PointToPoint, gloo, store_of

if TYPE_CHECKING:
    from leetdist.kernels.common.hop import Way

SLOTS = 4


class Box:
    """One rank's part of the symmetric memory, (words,) int32. Messages go right (direction 0) or left (1): the slots
    and "full" flags are for what comes here, the "free" flags for what leaves."""

    def __init__(self, memory: Tensor, pieces: int) -> None:
        count = 2 * 2 * SLOTS * pieces
        flags = memory[:count].view(2, 2, SLOTS, pieces)
        self.full, self.free = ([direction.unbind() for direction in kind] for kind in flags)
        self.slots = [direction.unbind() for direction in memory[count:].view(2, SLOTS, -1)]

    @staticmethod
    def words(slot_words: int, pieces: int) -> int:
        return 2 * SLOTS * (2 * pieces + slot_words)

    def message(self, direction: int, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A slot as a tensor of the message's shape."""
        words = torch.Size(shape).numel() * dtype.itemsize // 4
        return self.slots[direction][slot][:words].view(dtype).view(shape)


class Inboxes:
    """Symmetric memory of the ranks of a group that share this rank's node; ranks are those of the group."""

    def __init__(self, transport: PointToPoint, node: list[int]) -> None:
        from leetdist.kernels.common import hop

        self.hop = hop
        self.transport, self.rank = transport, transport.rank
        self.local = {rank: number for number, rank in enumerate(node)}
        self.neighbours = {self.rank - 1, self.rank + 1}.intersection(range(transport.size))
        self.store = Renumbered(store_of(transport.group, f"part/{node[0]}"))  # C++ alone would not keep it alive
        self.group = _part(transport, node, self.store)
        self.slot_words = 0
        self.boxes: dict[int, Box] = {}
        self.ways: Memo[Any, Way] = Memo(4096)  # made once each, because a view takes the host microseconds
        self.kept: list[Any] = []  # a graph may hold the address of inboxes that have been outgrown
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}

    def close(self) -> None:
        """Let go of the memory, and of the group by which PyTorch knows it."""
        from torch._C._distributed_c10d import _unregister_process_group

        with suppress(RuntimeError, ValueError):
            _unregister_process_group(self.group.group_name)
        self.boxes, self.kept = {}, []
        self.ways.clear()

    def serves(self, like: Tensor, size: int, rank: int) -> bool:
        """Whether a message of so many bytes has room in a slot: the shares of a gradient's tiles may have none."""
        return like.is_cuda and rank in self.local and size <= 4 * self.slot_words

    def reserve(self, size: int, device: torch.device) -> None:
        """Slots of `size` bytes at least; all ranks of the node call this together, with the same size."""
        if size <= 4 * self.slot_words:
            return
        import torch.distributed._symmetric_memory as symmetric

        with torch.cuda.device(device):  # the current one may be another
            self._make(-(-size // 256) * 64, device, symmetric)

    def _make(self, slot_words: int, device: torch.device, symmetric: Any) -> None:
        self.slot_words = slot_words
        words = Box.words(self.slot_words, self.hop.PIECES)
        memory = symmetric.empty(words, dtype=torch.int32, device=device)
        own = Box(memory.zero_(), self.hop.PIECES)
        for flags in (*own.free[0], *own.free[1]):
            flags.fill_(1)
        torch.cuda.synchronize(device)  # from the rendezvous on, neighbours write here
        handle = symmetric.rendezvous(memory, self.group.group_name)
        self.kept.append((memory, handle))
        self.sent, self.received = {}, {}
        self.ways.clear()
        self.boxes = {self.rank: own}
        for rank in (self.rank - 1, self.rank + 1):
            if rank in self.local:
                self.boxes[rank] = Box(handle.get_buffer(self.local[rank], (words,), torch.int32), self.hop.PIECES)

    def place(self) -> Hashable | None:
        """As leetdist.sequence.transport.Transport.place. Outgrown inboxes are kept, so a number tells these."""
        if self.transport.staged and not self.neighbours.issubset(self.local):
            return None
        return len(self.kept), self.transport.patience(), *self.sent.items(), *self.received.items()

    def _step(self, slots: dict[int, int], other: int, size: int = 0) -> None:
        """On to the slot of the next message to or from another rank; `size`: bytes that are sent."""

        def step() -> None:
            slots[other] = (slots.get(other, 0) + 1) % SLOTS
            self.transport.bytes_sent += size

        recording.take(step, aside=True)

    def leaving(self, shape: tuple[int, ...], dtype: torch.dtype, to: int) -> Way:
        """The way of the next message to another rank."""
        way = self._way(self.rank, to, self.sent.get(to, 0), shape, dtype)
        self._step(self.sent, to, way.slot.nbytes)
        return way

    def arriving(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Way:
        way = self._way(source, self.rank, self.received.get(source, 0), shape, dtype)
        self._step(self.received, source)
        return way

    def _way(self, source: int, to: int, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Way:
        key = source, to, slot, shape, dtype, self.transport.patience()
        way = self.ways.get(key)
        if way is None:
            direction, at, of = int(source > to), self.boxes[to], self.boxes[source]
            ranks = self.rank, source + to - self.rank
            way = self.ways[key] = self.hop.Way(
                at.message(direction, slot, shape, dtype), at.full[direction][slot], of.free[direction][slot],
                ranks=ranks, seconds=key[-1],
            )  # fmt: skip
        return way

    def put(self, tensor: Tensor, to: int) -> None:
        self.hop.put(tensor.contiguous(), self.leaving(tensor.shape, tensor.dtype, to))

    @contextmanager
    def taken(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Iterator[Tensor]:
        """The next message from `source`, in the inbox itself: what the stream does with it is launched inside."""
        way = self.arriving(shape, dtype, source)
        self.hop.wait(way)
        yield way.slot
        self.hop.release(way)


def _part(transport: PointToPoint, ranks: list[int], store: Store) -> dist.ProcessGroup:
    """A process group of some of the ranks, made by them alone: a name, numbers and a store, by which PyTorch's
    symmetric memory finds them."""
    from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

    rank, size = ranks.index(transport.rank), len(ranks)
    name: Any = f"leetdist/{transport.name}/{ranks[0]}"
    group, kind = c10d.ProcessGroup(store, rank, size), c10d.ProcessGroup.BackendType.GLOO
    group._register_backend(torch.device("cpu"), kind, gloo(transport.group, store, rank, size))
    group._set_default_backend(kind)
    group._set_group_name(name)
    _register_process_group(name, group)
    with suppress(RuntimeError):  # some versions of PyTorch look here
        _SymmetricMemory.set_group_info(name, rank, size, store)
    return group


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
