"""States that travel within a node by one-sided copies: the sender writes into the receiver's memory and signals.

`torch.distributed._symmetric_memory` maps every rank's inbox into every other rank of the node
(leetdist.sequence.inboxes). Where it can, the fold takes a state out of its inbox and writes its end into the next
(`hop`); else a hop is a kernel on the sender's stream (wait for the slot to be free, copy, signal) and one on the
receiver's that waits for the signal (leetdist.kernels.common.hop). No host and no other rank takes part, and CUDA
graphs capture all of it. NVLink multicast is not used.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from leetdist.sequence.encoding import plain
from leetdist.sequence.inboxes import Inboxes
from leetdist.sequence.p2p import PointToPoint
from leetdist.sequence.transport import Message, Transport

if TYPE_CHECKING:
    from leetdist.kernels.common.hop import Hop


class Symmetric(Transport):
    """Another transport, but the scan's states, which go through inboxes where two neighbours share a node."""

    kind = "symmetric"

    def __init__(self, under: PointToPoint, inboxes: Inboxes | None) -> None:
        """inboxes: None on a rank that is alone on its node."""
        self.under, self.inboxes = under, inboxes
        super().__init__()
        self.name, self.rank, self.size = under.name, under.rank, under.size

    @property
    def group(self) -> dist.ProcessGroup:
        return self.under.group

    @property
    def seconds(self) -> float | None:
        return self.under.seconds

    @seconds.setter
    def seconds(self, seconds: float | None) -> None:
        self.under.seconds = seconds

    @property
    def bytes_sent(self) -> int:
        return self.under.bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, count: int) -> None:
        self.under.bytes_sent = count

    def collective(self, what: str) -> AbstractContextManager[None]:
        return self.under.collective(what)

    def call(self, phase: str) -> AbstractContextManager[None]:
        return self.under.call(phase)

    def send(self, tensor: Tensor, to: int, what: str) -> None:
        self.under.send(tensor, to, what)

    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        return self.under.receive(tensor, source, what)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], what: str) -> None:
        self.under.exchange(outgoing, incoming, what)

    def flush(self) -> None:
        self.under.flush()

    def swap_objects(self, mine: tuple[str, Any], what: str) -> list[tuple[str, Any]]:
        return self.under.swap_objects(mine, what)

    def alike(self, number: int, what: str) -> bool:
        return self.under.alike(number, what)

    def tell(self, number: int) -> int | None:
        return self.under.tell(number)

    def swap_header(self, header: list[int], to: int, source: int, what: str) -> list[int]:
        return self.under.swap_header(header, to, source, what)

    def reserve(self, size: int, device: torch.device) -> None:
        if self.inboxes is not None and device.type == "cuda":
            self.inboxes.reserve(size, device)

    def send_state(self, tensor: Tensor, to: int, what: str) -> None:
        if self.inboxes is None or not self.inboxes.serves(tensor, tensor.nbytes, to):
            return super().send_state(tensor, to, what)
        self.inboxes.put(tensor, to)

    @contextmanager
    def receive_state(self, shape: tuple[int, ...], like: Tensor, source: int, what: str) -> Iterator[Tensor]:
        size = torch.Size(shape).numel() * like.itemsize
        if self.inboxes is None or not self.inboxes.serves(like, size, source):
            received = super().receive_state(shape, like, source, what)
        else:
            received = self.inboxes.taken(shape, like.dtype, source)
        with received as state:
            yield state

    def hop(self, shape: tuple[int, ...], like: Tensor, source: int | None, to: int | None) -> Hop | None:
        inboxes, size = self.inboxes, torch.Size(shape).numel() * like.itemsize
        others = [rank for rank in (source, to) if rank is not None]
        if inboxes is None or not all(inboxes.serves(like, size, rank) for rank in others):
            return None
        if not inboxes.hop.can_fold(shape, like.dtype):
            return None
        return inboxes.hop.Hop(
            None if source is None else inboxes.arriving(shape, like.dtype, source),
            None if to is None else inboxes.leaving(shape, like.dtype, to),
        )

    def place(self) -> Hashable | None:
        return self.under.place() if self.inboxes is None else self.inboxes.place()

    def close(self) -> None:
        super().close()
        if self.inboxes is not None:
            self.inboxes.close()
        self.under.close()


def wanted_transport(given: str | None = None) -> str:
    """What is given, or LEETDIST_TRANSPORT, or "auto"; ValueError where it is none of those that there are."""
    wanted = given or os.environ.get("LEETDIST_TRANSPORT", "auto")
    if wanted not in ("auto", "p2p", "symmetric"):
        raise ValueError(f"transport (or LEETDIST_TRANSPORT) must be auto, p2p or symmetric, got {wanted!r}")
    return wanted


def connect(under: PointToPoint, wanted: str | None) -> Transport:
    """The transport that `wanted` ("auto", "p2p" or "symmetric"; None: LEETDIST_TRANSPORT, or "auto") and the machine
    allow. All ranks of the group call this together and come to the same end. "auto" takes symmetric memory where the
    ranks' GPUs have it, and p2p elsewhere.
    """
    wanted = wanted_transport(wanted)
    if wanted == "p2p" or (wanted == "auto" and under.staged) or under.size == 1:
        return under
    with under.call("set-up"):
        gpu = under.device if torch.cuda.is_available() else None
        everyone = under.gather_objects(Home.mine(gpu), "where its GPU is")
        hosts = [home.host for home in everyone]
        node = [rank for rank in range(under.size) if hosts[rank] == hosts[under.rank]]
        obstacle, inboxes = why_not(everyone), None
        if obstacle is None and len(node) > 1:
            try:
                inboxes = Inboxes(under, node)
                inboxes.reserve(1, under.device)
            except (RuntimeError, ImportError, AttributeError) as error:
                obstacle = f"symmetric memory fails on rank {under.rank}: {error}"
        obstacles = [x for x in under.gather_objects(obstacle, "whether it has symmetric memory") if x]
    if not obstacles:
        return Symmetric(under, inboxes)
    if inboxes is not None:
        inboxes.close()
    if wanted == "symmetric":
        raise ValueError(f"transport 'symmetric' cannot serve this group: {obstacles[0]}")
    return under


@plain
@dataclass(frozen=True)
class Home:
    """A rank's host, its GPU, whether that reaches all other GPUs it can see, and whether ranks may share one."""

    host: str
    gpu: str | None
    reaches: bool = True
    may_share: bool = False

    @staticmethod
    def mine(gpu: torch.device | None) -> Home:
        boot = Path("/proc/sys/kernel/random/boot_id")
        host = socket.gethostname() + (boot.read_text() if boot.exists() else "")
        if gpu is None:
            return Home(host, None)
        me = gpu.index
        return Home(
            host,
            str(getattr(torch.cuda.get_device_properties(me), "uuid", "unknown")),
            all(torch.cuda.can_device_access_peer(me, n) for n in range(torch.cuda.device_count()) if n != me),
            os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1",
        )


def why_not(homes: list[Home]) -> str | None:
    """Why these ranks cannot have symmetric memory, in words; None where nothing is known against it."""
    if len({home.host for home in homes}) == len(homes):
        return "no two ranks are on one host"
    for rank, home in enumerate(homes):
        if home.gpu is None:
            return f"rank {rank} has no GPU"
        if not home.reaches:
            return f"the GPU of rank {rank} has no direct access to all others of its host"
        for other in range(rank):
            if (homes[other].host, homes[other].gpu) == (home.host, home.gpu) and not home.may_share:
                return f"ranks {other} and {rank} share a GPU"
    return None
