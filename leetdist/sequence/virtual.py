"""Virtual ranks: P ranks as threads of one process, on one device, through the same public API.

A laptop or one GPU runs the real sharded code, at any P. The ranks take turns in no fixed order, as processes do;
messages are tensors handed over in memory.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from leetdist.arguments import as_int
from leetdist.sequence.transport import Transport

T = TypeVar("T")
DEFAULT_TIMEOUT_SECONDS = 300.0
MOST_RANKS = 512
GRACE_SECONDS = 0.5  # for ranks to end in, after Ctrl-C


def virtual_ranks(function: Callable[[VirtualGroup], T], ranks: int) -> list[T]:
    """Call `function(group)` on `ranks` virtual ranks at once, and return what each returned, in rank order.

    `group` goes wherever leetdist takes a process group: `linear_attention(..., group=group)`, `shard_sequence`,
    `gather_sequence`, `sequence_parallel`. Forward and backward both run inside `function`.

    Args:
        function: called once a rank, each time in a thread of its own, on the caller's device.
        ranks: number of virtual ranks, at least 1.

    Raises:
        ValueError: `ranks` is not from 1 to 512, or `function` is none.
        Exception: whatever a rank raised first; the other ranks are stopped where they next use the group.
        RuntimeError: a rank has returned while another waits for it.
        KeyboardInterrupt: on Ctrl-C, at once; a rank that does something else than use the group goes on until it does.

    Source: the sequence parallelism of LASP, arXiv 2404.02882, with threads as its ranks. Shapes: none of its own;
    tensors keep the (B, H, N, D) of `linear_attention`, any of its dtypes.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    >>> def rank(group):
    ...     return leetdist.linear_attention(
    ...         *(leetdist.shard_sequence(x, 2, group) for x in (q, k, v)), group=group)
    >>> shards = leetdist.virtual_ranks(rank, ranks=3)
    >>> torch.equal(torch.cat(shards, 2), leetdist.linear_attention(q, k, v))
    True
    """
    if not callable(function):
        raise ValueError(f"function must be callable, got {type(function).__name__}")
    ranks = as_int("ranks", ranks)
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if ranks > MOST_RANKS:
        raise ValueError(f"ranks must be at most {MOST_RANKS}, each is a thread, got {ranks}")
    hub = _Hub(ranks)
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    stream = torch.cuda.current_stream() if device is not None else None
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        try:
            if stream is not None:
                torch.cuda.set_stream(stream)
            # All CUDA backwards would share one worker thread, where a waiting rank would block the one it waits for.
            with torch.set_grad_enabled(grad), torch.autograd.set_multithreading_enabled(False):
                results[rank] = function(VirtualGroup(hub, rank))
        except BaseException as error:
            hub.fail(rank, error)
        finally:
            hub.end(rank)

    for rank in range(ranks):
        threading.Thread(target=run, args=(rank,), name=f"leetdist-rank-{rank}", daemon=True).start()
    try:
        hub.join()
    except BaseException as error:  # Ctrl-C
        hub.fail(None, error)
        hub.join(GRACE_SECONDS)  # a thread that is in torch's code when Python ends, ends the process with signal 6
        raise
    if hub.failure is not None:
        raise hub.failure[1]
    return [results[rank] for rank in range(ranks)]


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

    def swap_objects(self, mine: tuple[str, Any], what: str) -> list[tuple[str, Any]]:
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


class _Hub:
    """The mailboxes between all pairs of virtual ranks, for each kind of message, and who has ended how."""

    def __init__(self, size: int) -> None:
        self.size, self.number = size, next(_numbers)
        self.failure: tuple[int | None, BaseException] | None = None  # the first; of no rank: the caller's
        self.ended: set[int] = set()
        self.boxes: defaultdict[tuple[int, int, str], deque[Any]] = defaultdict(deque)
        self.waits: dict[int, tuple[int, str, str]] = {}  # on whom a rank waits, for which kind of message, for what
        self.lock = threading.Lock()
        self.changed = [threading.Condition(self.lock) for _ in range(size)]  # for each rank that may wait
        self.all_ended = threading.Condition(self.lock)

    def put(self, source: int, to: int, message: Any, kind: str) -> None:
        with self.lock:
            self._check(source, f"cannot send to rank {to}: ")
            self.boxes[source, to, kind].append(message)
            self.changed[to].notify()

    def take(self, source: int, to: int, what: str, kind: str, seconds: float) -> Any:
        with self.lock:  # also to make the box, or two threads make two, and what is in one is lost
            box = self.boxes[source, to, kind]
            until = time.monotonic() + seconds
            self.waits[to] = source, kind, what
            try:
                while not box:
                    self._check(to, f"waited on rank {source} for {what}, and ")
                    if source in self.ended:
                        raise RuntimeError(
                            f"leetdist: rank {source} of {self.size} has returned, and rank {to} still waits for "
                            f"{what} of it: it made fewer calls of the group"
                        )
                    self._check_step(to)
                    left = until - time.monotonic()
                    if left <= 0:
                        raise RuntimeError(
                            f"leetdist: rank {source} of {self.size} does not answer. Rank {to} waited {seconds:.1f} s "
                            f"for {what}"
                        )
                    self.changed[to].wait(left)
                return box.popleft()
            finally:
                self.waits.pop(to, None)

    def _check_step(self, rank: int) -> None:
        """Ranks that wait for each other do so for ever."""
        ring, on = [rank], self.waits[rank][0]
        while on not in ring and on in self.waits:
            source, kind, _ = self.waits[on]
            if self.boxes[source, on, kind]:
                return
            ring.append(on)
            on = source
        if on == rank:
            told = "; ".join(
                f"rank {each} waits for rank {self.waits[each][0]} for {self.waits[each][2]}" for each in ring
            )
            raise RuntimeError(f"leetdist: the ranks make different calls of the group: {told}")

    def _check(self, rank: int, doing: str) -> None:
        if self.failure is None:
            return
        other, error = self.failure
        failed = "the caller was interrupted" if other is None else f"rank {other} of {self.size} failed"
        raise RuntimeError(f"leetdist: rank {rank} {doing}{failed}: {str(error) or type(error).__name__}") from error

    def fail(self, rank: int | None, error: BaseException) -> None:
        with self.lock:
            if self.failure is None:
                self.failure = (rank, error)
            self._wake()

    def end(self, rank: int) -> None:
        with self.lock:
            self.ended.add(rank)
            self._wake()
            self.all_ended.notify()

    def _wake(self) -> None:
        for waiting in self.changed:
            waiting.notify_all()

    def join(self, seconds: float | None = None) -> None:
        """Until all ranks have ended, or so long."""
        with self.lock:
            self.all_ended.wait_for(lambda: len(self.ended) == self.size, seconds)
