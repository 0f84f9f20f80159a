"""How ranks talk: the interface, and its point-to-point implementation over torch.distributed.

Ranks are ranks of the group, never of the world. Every wait ends: with what was waited for, or with a RuntimeError that
names the rank that did not answer.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

# Seconds a failing rank waits for its neighbours to say whether they live, before it names the one it waited for.
ROLL_CALL_SECONDS = 2.0


class Transport(ABC):
    """Messages between the ranks of one group, in order between any two ranks."""

    rank: int
    size: int

    @abstractmethod
    def send(self, tensor: Tensor, to: int, what: str) -> None:
        """Start sending; `flush` waits for it. The tensor must not change until then."""

    @abstractmethod
    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        """Fill `tensor` with what `source` sends, and return it."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until what was sent has left."""

    @abstractmethod
    def gather_objects(self, mine: Any, what: str) -> list[Any]:
        """Every rank's object, on every rank, over the host."""

    def broadcast(self, tensor: Tensor, source: int, what: str) -> Tensor:
        """`tensor` as it is on `source`, on every rank."""
        if self.rank == source:
            for rank in self.others():
                self.send(tensor, rank, what)
            return tensor
        return self.receive(tensor, source, what)

    def others(self) -> Iterator[int]:
        return (rank for rank in range(self.size) if rank != self.rank)


class PointToPoint(Transport):
    """Sends and receives of a process group: NCCL, gloo, or any other backend."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.seconds = _timeout_seconds()
        self.host_group = group if _has_gloo(group) else _companion(group)
        # gloo reads and writes host memory only.
        self.staged = "nccl" not in dist.get_backend_config(group)
        self.pending: list[tuple[dist.Work, Tensor, int, str]] = []

    def send(self, tensor: Tensor, to: int, what: str) -> None:
        tensor = tensor.contiguous()
        if tensor.numel():
            self._send(self.group, tensor.cpu() if self.staged else tensor, to, what)

    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        if not tensor.numel():
            return tensor
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if self.staged else tensor.device)
        return tensor.copy_(self._receive(self.group, buffer, source, what))

    def flush(self) -> None:
        pending, self.pending = self.pending, []
        for work, _, to, what in pending:
            with self._blame(to, f"to take {what}"):
                self._wait(work)

    def gather_objects(self, mine: Any, what: str) -> list[Any]:
        # Lengths first, then bytes: two small messages to each rank, no collective, so that a rank that does not answer
        # is known by its number.
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        for rank in self.others():
            self._send(self.host_group, length, rank, what)
            self._send(self.host_group, data, rank, what)
        everyone = [mine] * self.size
        for rank in self.others():
            size = self._receive(self.host_group, torch.empty_like(length), rank, what)
            theirs = torch.empty(int(size), dtype=torch.uint8)
            everyone[rank] = pickle.loads(self._receive(self.host_group, theirs, rank, what).numpy().tobytes())
        self.flush()
        return everyone

    def _send(self, group: dist.ProcessGroup, tensor: Tensor, to: int, what: str) -> None:
        with self._blame(to, f"to take {what}"):
            work = dist.isend(tensor, dist.get_global_rank(group, to), group)
            assert work is not None
            self.pending.append((work, tensor, to, what))

    def _receive(self, group: dist.ProcessGroup, buffer: Tensor, source: int, what: str) -> Tensor:
        with self._blame(source, f"for {what}"):
            work = dist.irecv(buffer, dist.get_global_rank(group, source), group)
            assert work is not None
            self._wait(work)
        return buffer

    def _wait(self, work: dist.Work) -> None:
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
            store = PrefixStore(f"leetdist/{self.group.group_name}", _get_default_store())
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


def _timeout_seconds() -> float | None:
    """LEETDIST_TIMEOUT, or None for the process group's own."""
    value = os.environ.get("LEETDIST_TIMEOUT")
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"LEETDIST_TIMEOUT must be a number of seconds, got {value!r}") from None


def _has_gloo(group: dist.ProcessGroup) -> bool:
    return "gloo" in dist.get_backend_config(group)


def _companion(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks, for what the hosts must agree on (a GPU backend would stop the stream)."""
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
