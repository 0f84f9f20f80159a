"""Few numbers between the processes of one host, in shared memory: what a call costs its hosts should be microseconds.

Every rank has a box that it alone writes and all others read: two places, used in turn, each with a sequence number,
the numbers and their hash. A rank writes its n-th letter when it has read all of the others' letters n - 1, so whoever
still reads a place finds it as it was; the hash tells a letter that is only half there (on processors that do not keep
the order of writes).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from leetdist.sequence.board import Board
from leetdist.sequence.memory import Process

NUMBERS = 6
PLACE = 8  # numbers a place takes: a cache line
# Looks at a box before the processor is left to others, and seconds between looks at whether the rank is alive.
SPINS = 200
LOOK_SECONDS = 0.1


class Gone(RuntimeError):
    """`rank` has ended, or has not written in time."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(why)
        self.rank = rank


class Mailbox:
    """The boxes of the ranks with these processes, in memory that they share, seen by `rank`."""

    def __init__(self, memory: memoryview, rank: int, processes: Sequence[Process]) -> None:
        self.rank, self.processes, self.count = rank, processes, 0
        self.numbers = memory.cast("q")

    @staticmethod
    def bytes(ranks: int) -> int:
        return ranks * 2 * PLACE * 8

    def exchange(self, letter: list[int], seconds: float, board: Board, what: str) -> list[list[int]]:
        """Every rank's letter of NUMBERS numbers, in rank order; all ranks call this equally often. The wait for all of
        them together takes `seconds` at most."""
        self.count += 1
        at = self._place(self.rank)
        record = [*letter, self._seal(letter), self.count]
        for offset, number in enumerate(record):  # the sequence number last
            self.numbers[at + offset] = number
        begin = time.monotonic()
        ranks = range(len(self.processes))
        return [letter if rank == self.rank else self._read(rank, begin, seconds, board, what) for rank in ranks]

    def _place(self, rank: int) -> int:
        return (2 * rank + self.count % 2) * PLACE

    def _seal(self, letter: list[int]) -> int:
        return hash((self.count, *letter))

    def _read(self, rank: int, begin: float, seconds: float, board: Board, what: str) -> list[int]:
        at = self._place(rank)
        looks, looked = 0, 0.0
        while True:
            *letter, seal, count = self.numbers[at : at + NUMBERS + 2]
            if count == self.count and seal == self._seal(letter):
                if looks > SPINS:
                    board.go_on()
                return letter
            looks += 1
            if looks < SPINS:
                continue
            if looks == SPINS:
                board.wait(rank, what)
            time.sleep(0 if looks < 4 * SPINS else 5e-5)
            now = time.monotonic()
            looked = looked or now
            if now - begin > seconds:
                raise Gone(rank, f"nothing came in {seconds:.1f} s")
            if now - looked > LOOK_SECONDS:
                looked = now
                if self.processes[rank].state() == "has ended":
                    raise Gone(rank, f"its process, {self.processes[rank].pid}, has ended")
                if board.read(rank).phase in ("failed", "left"):
                    raise Gone(rank, "it has given up")
