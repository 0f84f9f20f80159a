"""What each rank is doing, where the others can see it: so that a rank that waits in vain can tell who is at fault.

On one host the board is memory that the ranks share, and says at any time what a rank does, even one that is stopped.
Elsewhere each rank has a board of its own, and tells the others what is on it when it fails (leetdist.sequence.blame).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

OUTSIDE, FAILED, LEFT = "outside", "failed", "left"
PHASES = (OUTSIDE, "set-up", "agreement", "forward pass", "backward pass", "exchange", FAILED, LEFT)
NUMBER = {phase: number for number, phase in enumerate(PHASES)}
COUNTED = {"forward pass": 1, "backward pass": 2}  # where a record counts them
OTHER, SINCE, LENGTH, NUMBERS = 3, 4, 5, 8
TEXT = 448  # bytes
RECORD = NUMBERS * 8 + TEXT


@dataclass(frozen=True)
class Activity:
    """A phase, the passes begun so far, and the rank waited for (-1: none), for how long and for what.

    Of a rank that failed: the rank that it found at fault (-1: its own error), and the error.
    """

    phase: str
    forward: int
    backward: int
    other: int
    seconds: float
    what: str

    @property
    def waits(self) -> bool:
        return self.other >= 0 and self.phase not in (FAILED, LEFT)

    @property
    def step(self) -> tuple[str, int, int]:
        """What ranks have in common as long as they keep step."""
        return self.phase, self.forward, self.backward

    def __str__(self) -> str:
        passes = f"forward pass {self.forward}, backward pass {self.backward}"
        if self.phase == OUTSIDE:
            return f"is in no call of this group (its last: {passes})"
        if self.phase == FAILED:
            return f"failed ({passes}): {self.what}" if self.what else f"failed ({passes})"
        if self.phase == LEFT:
            return f"has left the group (its last: {passes})"
        where = f"{self.phase} {getattr(self, self.phase.split()[0])}" if self.phase in COUNTED else self.phase
        if self.phase not in COUNTED:
            where += f" after {passes}"
        return f"is in {where}" + (f" and waits for rank {self.other} {self.what}" if self.waits else "")


class Board:
    """One record a rank: numbers (phase, forward and backward passes, rank waited for, since when, bytes of text) and
    text. A rank writes its own."""

    def __init__(self, memory: memoryview, rank: int) -> None:
        self.memory, self.rank = memory, rank
        self.numbers = memory.cast("q")
        self.at = rank * RECORD // 8
        self.numbers[self.at + OTHER] = -1

    @staticmethod
    def bytes(ranks: int) -> int:
        return ranks * RECORD

    @staticmethod
    def alone() -> Board:
        """A board that nobody else sees."""
        return Board(memoryview(bytearray(RECORD)), 0)

    def begin(self, phase: str) -> None:
        self.numbers[self.at] = NUMBER[phase]
        if (count := COUNTED.get(phase)) is not None:
            self.numbers[self.at + count] += 1

    def end(self, phase: str = OUTSIDE) -> None:
        self.numbers[self.at] = NUMBER[phase]

    def wait(self, other: int, what: str) -> None:
        """This rank waits for another. what: "for ..." or "to take ..."."""
        self._write(what)
        self.numbers[self.at + SINCE] = time.monotonic_ns()
        self.numbers[self.at + OTHER] = other

    def go_on(self) -> None:
        self.numbers[self.at + OTHER] = -1

    def fail(self, other: int, error: str) -> None:
        self._write(error)
        self.numbers[self.at + OTHER] = other
        self.numbers[self.at] = NUMBER[FAILED]

    def _write(self, text: str) -> None:
        data = text.encode()[:TEXT]
        begin = 8 * (self.at + NUMBERS)
        self.memory[begin : begin + len(data)] = data
        self.numbers[self.at + LENGTH] = len(data)

    def mine(self) -> Activity:
        return self.read(self.rank)

    def read(self, rank: int) -> Activity:
        at = rank * RECORD // 8
        phase, forward, backward, other, since, length, *_ = self.numbers[at : at + NUMBERS]
        begin = 8 * (at + NUMBERS)
        text = bytes(self.memory[begin : begin + length]).decode(errors="ignore")
        seconds = (time.monotonic_ns() - since) * 1e-9 if other >= 0 else 0.0
        return Activity(PHASES[phase], forward, backward, other, seconds, text)
