"""Virtual ranks: P ranks as threads of one process, on one device, through the same public API.

A laptop or one GPU runs the real sharded code, at any P. The ranks take turns in no fixed order, as processes do;
messages are tensors handed over in memory.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from leetdist.sequence.transport import Transport

T = TypeVar("T")
DEFAULT_TIMEOUT_SECONDS = 300.0


def virtual_ranks(function: Callable[[VirtualGroup], T], ranks: int) -> list[T]:
    """Call `function(group)` on `ranks` virtual ranks at once, and return what each returned, in rank order.

    `group` goes wherever leetdist takes a process group: `linear_attention(..., group=group)`, `shard_sequence`,
    `gather_sequence`, `sequence_parallel`. Forward and backward both run inside `function`.

    Args:
        function: called once a rank, each time in a thread of its own, on the caller's device.
        ranks: number of virtual ranks, at least 1.

    Raises:
        ValueError: `ranks` is less than 1.
        Exception: whatever a rank raised first; the other ranks are stopped.

    Source: DESIGN of this library; the operator is LeetDecoding's, arXiv 2501.02573. Shapes: none of its own; tensors
    keep the (B, H, N, D) of `linear_attention`, any of its dtypes.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    >>> def rank(group):
    ...     return leetdist.linear_attention(
    ...         *(leetdist.shard_sequence(x, 2, group) for x in (q, k, v)), group=group)
    >>> shards = leetdist.virtual_ranks(rank, ranks=3)
    >>> torch.equal(torch.cat(shards, 2), leetdist.linear_attention(q, k, v))
    True
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    hub = _Hub(ranks)
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    stream = torch.cuda.current_stream() if device is not None else None

    def run(rank: int) -> T:
        try:
            if stream is not None:
                torch.cuda.set_stream(stream)
            # All CUDA backwards would share one worker thread, where a waiting rank would block the one it waits for.
            with torch.set_grad_enabled(grad), torch.autograd.set_multithreading_enabled(False):
                return function(VirtualGroup(hub, rank))
        except BaseException as error:
            hub.fail(rank, error)
            raise

    with ThreadPoolExecutor(ranks, thread_name_prefix="leetdist-rank") as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
        for future in futures:
            future.exception()
    if hub.failure is not None:
        raise hub.failure[1]
    return [future.result() for future in futures]


class VirtualGroup(Transport):
    """One virtual rank's view of its group: `rank` of `size`."""

    kind = "virtual"

    def __init__(self, hub: _Hub, rank: int) -> None:
        super().__init__()
        self.hub, self.rank, self.size = hub, rank, hub.size
        self.name = f"virtual {hub.number} rank {rank}"
        self.seconds = self.seconds or DEFAULT_TIMEOUT_SECONDS
        _names[self.name] = self

    def send(self, tensor: Tensor, to: int, what: str) -> None:
        message = tensor.detach().clone()
        self.bytes_sent += message.numel() * message.element_size()
        # The ranks' scans run on streams of their own.
        event = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
        self.hub.put(self.rank, to, (message, event), "tensor")

    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        message, event = self._take(source, what, "tensor")
        if event is not None:
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(event)
            message.record_stream(stream)
        return tensor.copy_(message)

    def flush(self) -> None:
        pass

    def gather_objects(self, mine: Any, what: str) -> list[Any]:
        for rank in self.others():
            self.hub.put(self.rank, rank, mine, "object")
        everyone = [mine] * self.size
        for rank in self.others():
            everyone[rank] = self._take(rank, what, "object")
        return everyone

    def swap_header(self, header: list[int], to: int, source: int, what: str) -> list[int]:
        self.hub.put(self.rank, to, header, "header")
        theirs: list[int] = self._take(source, what, "header")
        return theirs

    def _take(self, source: int, what: str, kind: str) -> Any:
        assert self.seconds is not None
        return self.hub.take(source, self.rank, what, kind, self.seconds)


_numbers = itertools.count()
_names: WeakValueDictionary[str, VirtualGroup] = WeakValueDictionary()


def by_name(name: str) -> VirtualGroup | None:
    """The virtual rank of a name that a compiled graph holds."""
    return _names.get(name)


@dataclass
class _Hub:
    """The mailboxes between all pairs of virtual ranks, for each kind of message."""

    size: int
    failure: tuple[int, BaseException] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        ranks = range(self.size)
        self.number = next(_numbers)
        self.boxes: dict[tuple[int, int, str], queue.SimpleQueue[Any]] = {
            (source, to, kind): queue.SimpleQueue()
            for source in ranks
            for to in ranks
            for kind in ("tensor", "object", "header")
        }

    def put(self, source: int, to: int, message: Any, kind: str) -> None:
        self.boxes[source, to, kind].put(message)

    def take(self, source: int, to: int, what: str, kind: str, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.boxes[source, to, kind].get(timeout=0.1)
            except queue.Empty:
                if self.failure is not None:
                    rank, error = self.failure
                    raise RuntimeError(
                        f"leetdist: rank {to} waited on rank {source} for {what}, and rank {rank} of {self.size} "
                        f"failed: {error}"
                    ) from error
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"leetdist: rank {source} of {self.size} does not answer. Rank {to} waited {seconds:.1f} s "
                        f"for {what}"
                    ) from None

    def fail(self, rank: int, error: BaseException) -> None:
        with self.lock:
            if self.failure is None:
                self.failure = (rank, error)
