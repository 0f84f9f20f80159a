"""States that travel within a node by one-sided copies: the sender writes into the receiver's memory and signals.

`torch.distributed._symmetric_memory` maps every rank's inbox into every other rank of the node. A hop is a wait for the
slot to be free, a copy, and a signal, all on the sender's stream; then a wait and a copy on the receiver's. No host and
no other rank takes part, and CUDA graphs capture all of it. NVLink multicast is not used.

Each directed link has SLOTS slots with two channels of signals each: "full", from the sender, and "free", from the
receiver. A slot is written only after "free" (given once for every slot when the inboxes are made) and read only after
"full", so a rank may be SLOTS messages ahead of its neighbour.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from leetdist.sequence.p2p import PointToPoint

SLOTS = 4
# A stuck wait in a kernel ends the program; long enough for a neighbour that saves a checkpoint.
DEFAULT_TIMEOUT_SECONDS = 1800.0


class Inboxes:
    """Symmetric memory of the ranks of a group that share this rank's node; ranks are those of the group."""

    def __init__(self, transport: PointToPoint, node: list[int]) -> None:
        from torch._C._distributed_c10d import _SymmetricMemory

        self.transport, self.rank = transport, transport.rank
        self.local = {rank: number for number, rank in enumerate(node)}
        # Its own name and store, because the ranks of a node need not be a process group.
        self.group_name = f"leetdist/{transport.name}/{'-'.join(map(str, node))}"
        store = transport.store(f"symmetric/{node[0]}")
        _SymmetricMemory.set_group_info(self.group_name, self.local[self.rank], len(node), store)
        self.slot_bytes = 0
        self.kept: list[Any] = []  # a graph may hold the address of inboxes that have been outgrown
        self.views: dict[Any, Tensor] = {}
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}

    def serves(self, tensor: Tensor, rank: int) -> bool:
        return tensor.is_cuda and rank in self.local

    def reserve(self, size: int, device: torch.device) -> None:
        """Slots of `size` bytes at least; all ranks of the node call this together, with the same size."""
        if size <= self.slot_bytes:
            return
        import torch.distributed._symmetric_memory as symmetric
        from torch._C._distributed_c10d import _SymmetricMemory

        self.slot_bytes = -(-size // 256) * 256
        memory = symmetric.empty(2 * SLOTS * self.slot_bytes, dtype=torch.uint8, device=device)
        self.handle = _SymmetricMemory.rendezvous(memory, self.group_name)
        self.kept.append((memory, self.handle))
        self.views, self.sent, self.received = {}, {}, {}
        for source in (self.rank - 1, self.rank + 1):
            if source in self.local:
                for slot in range(SLOTS):
                    self._signal(source, self._channel(source, self.rank, slot, free=True))

    def put(self, tensor: Tensor, to: int) -> None:
        slot = self.sent.get(to, 0) % SLOTS
        self.sent[to] = slot + 1
        self._await(to, self._channel(self.rank, to, slot, free=True))
        self._view(to, self.rank, slot, tuple(tensor.shape), tensor.dtype).copy_(tensor)
        self._signal(to, self._channel(self.rank, to, slot, free=False))

    @contextmanager
    def taken(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Iterator[Tensor]:
        """The next message from `source`, in the inbox itself: what the stream does with it is launched inside."""
        slot = self.received.get(source, 0) % SLOTS
        self.received[source] = slot + 1
        self._await(source, self._channel(source, self.rank, slot, free=False))
        yield self._view(self.rank, source, slot, shape, dtype)
        self._signal(source, self._channel(source, self.rank, slot, free=True))

    @staticmethod
    def _channel(source: int, to: int, slot: int, *, free: bool) -> int:
        """Channels are counted for each pair of ranks; states go right in the forward scan and left in the backward."""
        return ((source > to) * 2 + free) * SLOTS + slot

    def _view(self, owner: int, source: int, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The slot in `owner`'s inbox for what comes from `source`."""
        direction = int(source > owner)
        key = (owner, direction, slot, shape, dtype)
        if key not in self.views:
            offset = (direction * SLOTS + slot) * self.slot_bytes // dtype.itemsize
            self.views[key] = self.handle.get_buffer(self.local[owner], shape, dtype, offset)
        return self.views[key]

    def _signal(self, to: int, channel: int) -> None:
        self.handle.put_signal(self.local[to], channel, self._milliseconds)

    def _await(self, source: int, channel: int) -> None:
        self.handle.wait_signal(self.local[source], channel, self._milliseconds)

    @property
    def _milliseconds(self) -> int:
        return int(1000 * (self.transport.seconds or DEFAULT_TIMEOUT_SECONDS))


def connect(transport: PointToPoint, wanted: str | None) -> None:
    """Give the transport inboxes if `wanted` (None: LEETDIST_TRANSPORT, or "auto") and the machine allow it.

    All ranks of the group call this together and come to the same end. "auto" is p2p: symmetric memory has yet to be
    measured between GPUs (benchmarks/scaling.py does) before it may be anybody's default.
    """
    wanted = wanted or os.environ.get("LEETDIST_TRANSPORT", "auto")
    if wanted not in ("auto", "p2p", "symmetric"):
        raise ValueError(f"transport (or LEETDIST_TRANSPORT) must be auto, p2p or symmetric, got {wanted!r}")
    if wanted in ("auto", "p2p") or transport.size == 1:
        return
    everyone = transport.gather_objects(_place(), "where its GPU is")
    hosts = [host for host, *_ in everyone]
    node = [rank for rank in range(transport.size) if hosts[rank] == hosts[transport.rank]]
    problem = _obstacle(everyone)
    if problem is None and len(node) > 1:
        try:
            transport.inboxes = Inboxes(transport, node)
            transport.inboxes.reserve(1, torch.device("cuda", torch.cuda.current_device()))
        except (RuntimeError, ImportError, AttributeError) as error:
            problem = f"symmetric memory fails on rank {transport.rank}: {error}"
    problems = [p for p in transport.gather_objects(problem, "whether it has symmetric memory") if p]
    if problems:
        transport.inboxes = None
        if wanted == "symmetric":
            raise ValueError(f"transport 'symmetric' cannot serve this group: {problems[0]}")
    else:
        transport.kind = "symmetric"  # also on a rank that is alone on its node


def _place() -> tuple[str, str, bool]:
    """This host, this rank's GPU, and whether ranks may share one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    gpu = "none"
    if torch.cuda.is_available():
        gpu = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "unknown"))
    return host, gpu, os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"


def _obstacle(everyone: list[tuple[str, str, bool]]) -> str | None:
    if len({host for host, *_ in everyone}) == len(everyone):
        return "no two ranks are on one host"
    for rank, (host, gpu, may_share) in enumerate(everyone):
        if gpu == "none":
            return f"rank {rank} has no GPU"
        for other in range(rank):
            if everyone[other][:2] == (host, gpu) and not may_share:
                return f"ranks {other} and {rank} share a GPU"
    return None
