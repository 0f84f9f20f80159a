"""A state from one GPU into the memory of another, with flags that both sides see.

`put` waits until the slot is free, writes into the other GPU's memory and raises its flags; `wait` waits for them;
`release` says that the slot is free again. Every piece of a message has flags of its own, so programs wait for nobody
of their own grid. A flag is taken by whoever waits for it, so the same launches, replayed by a CUDA graph, work again.

A kernel that computes piece by piece (the fold) takes what comes and hands on what it has by itself: one launch, behind
a `look` for the first piece. The look is needed because programs that wait might hold all places of this GPU, and with
them those of a kernel that the sender waits for (a library's that runs on both GPUs, say). Once the first piece has
come, the sender waits for nobody any more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.runtime.triton_launch import launch

# Pieces of a message at most, and those that are enough; the fewest numbers of one, and the most that a program folds.
PIECES, ENOUGH = 1024, 512
LEAST, FOLDED = 512, 2048
# Programs that copy one message at most, and numbers that each moves at a time.
PROGRAMS, BLOCK = 128, 4096
# A wait looks at the clock, which the interpreter does not have.
TIMED = not triton.knobs.runtime.interpret


class Way:
    """Of one message: where it lies at the receiver's, the flags of its pieces there (`full`) and at the sender's
    (`free`); this rank and the other, for the message of a wait that takes longer than `seconds`."""

    def __init__(self, slot: Tensor, full: Tensor, free: Tensor, ranks: tuple[int, int], seconds: float) -> None:
        self.slot, self.full, self.free = slot, full, free
        self.count = slot.numel()
        self.share = share_of(self.count)  # numbers of a piece
        self.pieces = ceil_div(self.count, self.share)
        self.patience = int(seconds * 1e9), float(ranks[0]), float(ranks[1])  # what a kernel that waits is told
        flags = triton.next_power_of_2(self.pieces)
        group = max(1, flags // PROGRAMS)  # pieces that a program of a put moves
        self.programs = (ceil_div(self.pieces, group),)
        self.moved = {"TIMED": TIMED, "GROUP": group, "BLOCK": min(group * self.share, BLOCK)}
        self.raised, self.warps = {"FLAGS": flags}, ceil_div(flags, 32)
        self.awaited = {"TIMED": TIMED, **self.raised}


class Hop(NamedTuple):
    """The ways of the states that a fold begins with, and of those that it ends with, where another rank has them."""

    arriving: Way | None
    leaving: Way | None


def share_of(count: int) -> int:
    wanted, needed = (triton.next_power_of_2(ceil_div(count, pieces)) for pieces in (ENOUGH, PIECES))
    return max(LEAST, min(wanted, FOLDED), needed)


def can_fold(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a fold takes and hands on messages of this shape, (B, H, Dk, Dv), by itself: its programs compute whole
    pieces, each of one head."""
    count = torch.Size(shape).numel()
    share = share_of(count)
    return dtype == torch.float32 and count > 0 and share <= FOLDED and shape[2] * shape[3] % share == 0


def put(source: Tensor, way: Way) -> None:
    """Copy contiguous `source`, of the slot's shape and dtype, once all `free` are up, and raise `full`."""
    arguments = (source, way.slot, way.free, way.full, way.count, way.pieces, way.share, *way.patience)
    launch(_put, way.programs, arguments, way.moved, num_warps=8)


def wait(way: Way) -> None:
    """Until all of `full` are up; takes them down."""
    launch(_wait, (1,), (way.full, way.pieces, *way.patience), way.awaited, num_warps=way.warps)


def look(way: Way) -> None:
    """Until the first of `full` is up; leaves it so."""
    launch(_look, (1,), (way.full, *way.patience), {"TIMED": TIMED}, num_warps=1)


def release(way: Way) -> None:
    """Raise `free`, on the other GPU."""
    launch(_release, (1,), (way.free, way.pieces), way.raised, num_warps=way.warps)


@triton.jit
def _check_clock(begin, limit, rank, other, TIMED: tl.constexpr):
    """End the program of a wait that has lasted for `limit` ns; only a trap ends the kernel on all of the GPU. One
    thread looks, says so and ends them all, for each would say it."""
    if TIMED:
        thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        if thread == 0:
            if tl.extra.cuda.globaltimer() - begin > limit:
                tl.device_print("leetdist: symmetric memory: waited too long, this rank", rank.to(tl.int32))
                tl.device_print("leetdist: symmetric memory: waited too long, for rank", other.to(tl.int32))
                tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _now(TIMED: tl.constexpr):
    return tl.extra.cuda.globaltimer() if TIMED else 0


@triton.jit
def await_flag(flag, then, limit, rank, other, TIMED: tl.constexpr):
    """Until it is up, which it is not any longer with a `then` of 0."""
    begin = _now(TIMED)
    while tl.atomic_cas(flag, 1, then, sem="acquire", scope="sys") != 1:
        _check_clock(begin, limit, rank, other, TIMED)


@triton.jit
def raise_flag(flag):
    tl.debug_barrier()  # one thread raises it for what all have written, or read
    tl.atomic_xchg(flag, 1, sem="release", scope="sys")


@triton.jit
def _await_all(flags, some, limit, rank, other, TIMED: tl.constexpr):
    """Until `some` of these are up; takes them down."""
    down = tl.zeros_like(some.to(tl.int32))
    waiting = some
    begin = _now(TIMED)
    while tl.max(waiting.to(tl.int32)) > 0:
        _check_clock(begin, limit, rank, other, TIMED)
        waiting = waiting & (tl.atomic_xchg(flags, down, mask=waiting, sem="acquire", scope="sys") == 0)


@triton.jit
def _raise_all(flags, some):
    tl.atomic_xchg(flags, tl.zeros_like(some.to(tl.int32)) + 1, mask=some, sem="release", scope="sys")


@triton.jit(do_not_specialize=["limit"])
def _put(
    source, target, free, full, count, pieces, share, limit, rank, other,
    TIMED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    first = tl.program_id(0) * GROUP * share
    for offset in range(first, tl.minimum(first + GROUP * share, count), BLOCK):
        i = offset + tl.arange(0, BLOCK)
        moved = tl.load(source + i, mask=i < count)  # (of whole blocks, which keeps four numbers together)
        if offset == first:  # behind the load, which waits for nobody
            _await_all(free + piece, piece < pieces, limit, rank, other, TIMED)
        tl.store(target + i, moved, mask=i < count)
    tl.debug_barrier()  # some threads raise the flags for what all have written
    _raise_all(full + piece, piece < pieces)


@triton.jit(do_not_specialize=["limit"])
def _wait(full, pieces, limit, rank, other, TIMED: tl.constexpr, FLAGS: tl.constexpr):
    i = tl.arange(0, FLAGS)
    _await_all(full + i, i < pieces, limit, rank, other, TIMED)


@triton.jit(do_not_specialize=["limit"])
def _look(full, limit, rank, other, TIMED: tl.constexpr):
    await_flag(full, 1, limit, rank, other, TIMED)


@triton.jit
def _release(free, pieces, FLAGS: tl.constexpr):
    i = tl.arange(0, FLAGS)
    _raise_all(free + i, i < pieces)
