"""A number between the processes of one host, in shared memory: what a call costs its hosts should be microseconds.

Every rank has a box that it alone writes and all others read: two places, used in turn, each with a number, its seal
and the letter's own number in their sequence. A rank writes its n-th letter when it has read all of the others' letters
n - 1, so whoever still reads a place finds it as it was; the seal tells a letter that is only half there (on processors
that do not keep the order of writes).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence

from leetdist.sequence.board import FAILED, LEFT, Board
from leetdist.sequence.memory import Process

PLACE = 8  # numbers a place takes: a cache line
# Looks at a box after which others may go on, each time, and seconds until this rank sleeps between looks.
SPINS = 200
AWAKE_SECONDS = 2e-3
LOOK_SECONDS = 0.1  # between looks at whether the rank is alive


class Gone(RuntimeError):
    """`rank` has ended, or has not written in so many seconds."""

    def __init__(self, rank: int, why: str, seconds: float) -> None:
        super().__init__(why)
        self.rank, self.seconds = rank, seconds


class Mailbox:
    """The boxes of the ranks with these processes, in memory that they share, seen by `rank`."""

    def __init__(self, memory: memoryview, rank: int, processes: Sequence[Process]) -> None:
        self.rank, self.processes, self.count = rank, processes, 0
        self.numbers = memory.cast("q")
        self.others = [other for other in range(len(processes)) if other != rank]

    @staticmethod
    def bytes(ranks: int) -> int:
        return ranks * 2 * PLACE * 8

    def alike(self, number: int, seconds: float, board: Board, what: str) -> bool:
        """Whether all ranks have come with this number; they call this equally often. The wait for all of them together
        takes `seconds` at most."""
        self.count += 1
        numbers, at = self.numbers, self._place(self.rank)
        numbers[at], numbers[at + 1] = number, self._seal(number)
        numbers[at + 2] = self.count  # last
        begin, same = 0.0, True
        for rank in self.others:
            at = self._place(rank)
            theirs, seal, count = numbers[at : at + 3]
            if count != self.count or seal != self._seal(theirs):
                begin = begin or time.monotonic()
                theirs = self._wait(rank, begin, seconds, board, what)
            same = same and theirs == number
        return same

    def _place(self, rank: int) -> int:
        return (2 * rank + self.count % 2) * PLACE

    def _seal(self, number: int) -> int:
        return number ^ self.count

    def _wait(self, rank: int, begin: float, seconds: float, board: Board, what: str) -> int:
        """The number of a rank that has not written it yet."""
        at = self._place(rank)
        looks, looked = 0, 0.0
        while True:
            number, seal, count = self.numbers[at : at + 3]
            if count == self.count and seal == self._seal(number):
                if looks > SPINS:
                    board.go_on()
                return number
            looks += 1
            if looks < SPINS:
                continue
            if looks == SPINS:
                board.wait(rank, what)
            now = time.monotonic()
            if now - begin > AWAKE_SECONDS:
                time.sleep(5e-5)
            elif looks % SPINS == 0:
                _let_others_go_on()
            looked = looked or now
            if now - begin > seconds:
                raise Gone(rank, f"nothing came in {seconds:.1f} s", now - begin)
            if now - looked > LOOK_SECONDS:
                looked = now
                if self.processes[rank].state() == "has ended":
                    raise Gone(rank, f"its process, {self.processes[rank].pid}, has ended", now - begin)
                if board.read(rank).phase in (FAILED, LEFT):
                    raise Gone(rank, "it has given up", now - begin)


def _let_others_go_on() -> None:
    """This process's threads, and other processes. Not time.sleep(0): that may take as long as the kernel's timers
    are late, tens of us, and a rank that comes late makes the others sleep as well."""
    select.select((), (), (), 0)  # which lets go of Python's lock
    os.sched_yield()
