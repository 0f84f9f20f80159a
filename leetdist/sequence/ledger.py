"""What the ranks of one host have said of their calls, in shared memory: a rank that makes another call than the others
is found without anybody waiting for it.

Each rank writes a number a call, with its seal and the call's own number in their sequence, into a ring of its own;
and looks at what the others have written for the calls that it has made itself. A rank that is behind finds the others'
numbers there, and one that is ahead finds theirs in a later call. What is overwritten, because a rank is CALLS ahead,
is not compared; the seal tells an entry that is only half there.
"""

from __future__ import annotations

CALLS = 256
ENTRY = 3  # numbers: that of the call, its seal, and which call
LOST = -(1 << 62)  # no rank writes it


class Ledger:
    """The rings of so many ranks, in memory that they share, seen by `rank`."""

    def __init__(self, memory: memoryview, rank: int, ranks: int) -> None:
        self.numbers, self.rank, self.count = memory.cast("q"), rank, 0
        self.compared = {other: 0 for other in range(ranks) if other != rank}  # calls, of each of the others

    @staticmethod
    def bytes(ranks: int) -> int:
        return ranks * CALLS * ENTRY * 8

    def tell(self, number: int) -> int | None:
        """Write the number of this rank's next call; and the first rank found to have written another, if any."""
        self.count += 1
        numbers, at = self.numbers, self._place(self.rank, self.count)
        numbers[at], numbers[at + 1] = number, number ^ self.count
        numbers[at + 2] = self.count  # last
        differs = None
        for other, before in self.compared.items():
            call = max(before, self.count - CALLS) + 1
            while call <= self.count:
                theirs = self._read(other, call)
                if theirs is None:
                    break
                if differs is None and theirs not in (LOST, self._read(self.rank, call)):
                    differs = other
                call += 1
            self.compared[other] = call - 1
        return differs

    def _read(self, rank: int, call: int) -> int | None:
        """None where it is not written yet, LOST where it is no longer."""
        at = self._place(rank, call)
        number, seal, count = self.numbers[at : at + ENTRY]
        if count < call:
            return None
        return number if count == call and seal == number ^ call else LOST

    @staticmethod
    def _place(rank: int, call: int) -> int:
        return (rank * CALLS + call % CALLS) * ENTRY
