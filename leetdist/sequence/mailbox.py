"""Few numbers between the processes of one host, in shared memory: what a call costs its hosts should be microseconds.

Every rank has a box that it alone writes and all others read: two places, used in turn, each with a sequence number,
the numbers and their hash. A rank writes its n-th letter when it has read all of the others' letters n - 1, so whoever
still reads a place finds it as it was; the hash tells a letter that is only half there (on processors that do not keep
the order of writes).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NUMBERS = 4
PLACE = 8  # numbers a place takes: a cache line
# Looks at a box before the processor is left to others, and seconds between looks at whether the rank is alive.
SPINS = 200
LOOK_SECONDS = 0.1
FOLDER = Path("/dev/shm")


class Gone(RuntimeError):
    """`rank` has ended, or has not written in time."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(why)
        self.rank = rank


class Mailbox:
    """The boxes of `size` ranks, seen by `rank`; `pids` are the ranks' processes."""

    def __init__(self, file: str, rank: int, pids: list[int]) -> None:
        self.rank, self.pids, self.count = rank, pids, 0
        with open(file, "r+b") as opened:
            self.memory = mmap.mmap(opened.fileno(), 0)
        self.numbers = memoryview(self.memory).cast("q")

    @staticmethod
    def create(size: int) -> str:
        """A file for the boxes of so many ranks, in memory."""
        handle, path = tempfile.mkstemp(prefix="leetdist-", dir=FOLDER)
        with open(handle, "wb") as file:
            file.write(bytes(size * 2 * PLACE * 8))
        return path

    def exchange(self, letter: list[int], seconds: float) -> list[list[int]]:
        """Every rank's letter of NUMBERS numbers, in rank order; all ranks call this equally often."""
        self.count += 1
        at = self._place(self.rank)
        record = [*letter, self._seal(letter), self.count]
        for offset, number in enumerate(record):  # the sequence number last
            self.numbers[at + offset] = number
        return [letter if rank == self.rank else self._read(rank, seconds) for rank in range(len(self.pids))]

    def _place(self, rank: int) -> int:
        return (2 * rank + self.count % 2) * PLACE

    def _seal(self, letter: list[int]) -> int:
        return hash((self.count, *letter))

    def _read(self, rank: int, seconds: float) -> list[int]:
        at = self._place(rank)
        looks, begin, looked = 0, 0.0, 0.0
        while True:
            *letter, seal, count = self.numbers[at : at + NUMBERS + 2]
            if count == self.count and seal == self._seal(letter):
                return letter
            looks += 1
            if looks < SPINS:
                continue
            time.sleep(0 if looks < 4 * SPINS else 5e-5)
            now = time.monotonic()
            begin, looked = begin or now, looked or now
            if now - begin > seconds:
                raise Gone(rank, f"nothing came in {seconds:.1f} s")
            if now - looked > LOOK_SECONDS:
                looked = now
                if not _alive(self.pids[rank]):
                    raise Gone(rank, f"its process, {self.pids[rank]}, has ended")


def open_mailbox(gather: Callable[[Any], list[Any]], rank: int, size: int) -> Mailbox | None:
    """The mailbox of ranks that are all on one host, else None; they call this together. `gather` brings every rank's
    object to all ranks."""
    path = ""
    if rank == 0:
        with suppress(OSError):
            path = Mailbox.create(size)
    path = gather(path)[0]
    pids = gather(os.getpid())
    mailbox = None
    # Another host has no such file; another container may have no such processes.
    with suppress(OSError, ValueError):
        if path and all(_alive(pid) for pid in pids):
            mailbox = Mailbox(path, rank, pids)
    everywhere = all(gather(mailbox is not None))
    if rank == 0 and path:
        Path(path).unlink(missing_ok=True)  # the memory lives as long as it is mapped
    return mailbox if everywhere else None


def _alive(pid: int) -> bool:
    """Whether a process runs: one that has ended may stay listed, as a zombie, until its parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False
