"""A state from one GPU into the memory of another, with flags that both sides see: one kernel for each step of a hop.

`put` waits until the slot is free, writes into the other GPU's memory and raises its flags; `wait` waits for them;
`release` says that the slot is free again. Every program of `put` has a flag of its own, so programs wait for nobody of
their own grid. A flag is taken by whoever waits for it, so the same launches, replayed by a CUDA graph, work again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.launch import launch
from leetdist.kernels.common.tiles import ceil_div

# Programs that copy one message, and elements that each moves at a time.
PROGRAMS = 64
BLOCK = 4096
# A wait looks at the clock, which the interpreter does not have.
TIMED = not triton.knobs.runtime.interpret


def put(source: Tensor, target: Tensor, free: Tensor, full: Tensor, *, ranks: tuple[int, int], seconds: float) -> None:
    """Copy contiguous `source` to `target`, of its size and dtype, once `free` (PROGRAMS flags here) are up, and raise
    `full` (there). ranks: this one and the other, for the message of a wait that takes longer than `seconds`."""
    count = source.numel()
    share = ceil_div(count, PROGRAMS * BLOCK) * BLOCK
    launch(
        _put,
        (PROGRAMS,),
        (source, target, free, full, count, share, int(seconds * 1e9), float(ranks[0]), float(ranks[1])),
        {"TIMED": TIMED, "BLOCK": BLOCK},
        num_warps=8,
    )


def wait(full: Tensor, *, ranks: tuple[int, int], seconds: float) -> None:
    """Until all of `full` are up; takes them down."""
    arguments = (full, int(seconds * 1e9), float(ranks[0]), float(ranks[1]))
    launch(_wait, (1,), arguments, {"TIMED": TIMED, "PROGRAMS": PROGRAMS}, num_warps=1)


def release(free: Tensor) -> None:
    """Raise `free`, on the other GPU."""
    launch(_release, (1,), (free,), {"PROGRAMS": PROGRAMS}, num_warps=1)


@triton.jit
def _check_clock(begin, limit, rank, other, TIMED: tl.constexpr):
    """End the program of a wait that has lasted for `limit` ns; only a trap ends the kernel on all of the GPU."""
    if TIMED:
        if tl.extra.cuda.globaltimer() - begin > limit:
            tl.device_print("leetdist: symmetric memory: waited too long, this rank", rank.to(tl.int32))
            tl.device_print("leetdist: symmetric memory: waited too long, for rank", other.to(tl.int32))
            tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _now(TIMED: tl.constexpr):
    return tl.extra.cuda.globaltimer() if TIMED else 0


@triton.jit(do_not_specialize=["limit"])
def _put(source, target, free, full, count, share, limit, rank, other, TIMED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    begin = _now(TIMED)
    while tl.atomic_cas(free + program, 1, 0, sem="acquire", scope="sys") != 1:
        _check_clock(begin, limit, rank, other, TIMED)
    first = program * share
    for offset in range(first, tl.minimum(first + share, count), BLOCK):
        i = offset + tl.arange(0, BLOCK)
        tl.store(target + i, tl.load(source + i, mask=i < count), mask=i < count)
    tl.debug_barrier()  # one thread raises the flag for what all have written
    tl.atomic_xchg(full + program, 1, sem="release", scope="sys")


@triton.jit(do_not_specialize=["limit"])
def _wait(full, limit, rank, other, TIMED: tl.constexpr, PROGRAMS: tl.constexpr):
    flags = full + tl.arange(0, PROGRAMS)
    up = tl.full((PROGRAMS,), 1, tl.int32)
    down = tl.zeros((PROGRAMS,), tl.int32)
    begin = _now(TIMED)
    taken = tl.atomic_cas(flags, up, down, sem="acquire", scope="sys")
    while tl.sum(taken) < PROGRAMS:
        _check_clock(begin, limit, rank, other, TIMED)
        taken += tl.atomic_cas(flags, up, down, sem="acquire", scope="sys")


@triton.jit
def _release(free, PROGRAMS: tl.constexpr):
    up = tl.full((PROGRAMS,), 1, tl.int32)
    tl.atomic_xchg(free + tl.arange(0, PROGRAMS), up, sem="release", scope="sys")
