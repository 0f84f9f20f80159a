"""Who is at fault when a rank waits in vain: the end of the chain of those who wait for each other.

What is asked here may itself not be answered (a rank keeps the store), so it ends by the clock.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TypeAlias

from torch.distributed.distributed_c10d import Store

from leetdist.sequence.board import FAILED, LEFT, Activity, Board
from leetdist.sequence.memory import Process

# Seconds a failing rank waits for the others to say what they do, before it names the one it waited for.
ROLL_CALL_SECONDS = 2.0

Look: TypeAlias = "Callable[[int], Activity | str]"  # what a rank does, or what has become of it


@dataclass(frozen=True)
class Verdict:
    """The rank at fault, what is known of it, and the ranks that wait for it, from the one that asks."""

    rank: int
    known: str
    chain: tuple[int, ...]


class OnBoard:
    """Ranks of one host: what is on their board, and whether their processes run."""

    def __init__(self, board: Board, processes: list[Process]) -> None:
        self.board, self.processes = board, processes

    def __call__(self, rank: int) -> Activity | str:
        state = self.processes[rank].state()
        activity = self.board.read(rank)
        if state == "is stopped" or (state == "has ended" and activity.phase != FAILED):
            return f"its process, {self.processes[rank].pid}, {state}"
        return activity


class ByStore:
    """Ranks that share a store: what those who failed have left there."""

    def __init__(self, store: Store, board: Board, rank: int, other: int) -> None:
        self.store, self.until = store, time.monotonic() + ROLL_CALL_SECONDS
        note = asdict(board.mine()) | {"other": other}
        self.answered = False

        def leave() -> bytes:
            self.store.set(str(rank), json.dumps(note))
            return self.store.get(str(rank))

        self._ask(leave)
        self.reached = self.answered  # later it may have gone with a rank that has given up, too

    def __call__(self, rank: int) -> Activity | str:
        while self.answered:
            told = self._ask(lambda: self.store.get(str(rank)) if self.store.check([str(rank)]) else b"")
            if told:
                return Activity(**json.loads(told))
            if self.answered and time.monotonic() > self.until:
                return "it has not said what it does"
            time.sleep(0.05)
        return "it has not said what it does, and the store of the job is gone"

    def _ask(self, question: Callable[[], bytes | None]) -> bytes | None:
        """In a thread: a store whose host is stopped keeps whoever asks."""
        answer: list[bytes | None] = []

        def ask() -> None:
            with suppress(RuntimeError, ValueError):  # the store has gone with its rank
                answer.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(max(0.0, self.until + 0.5 - time.monotonic()))
        self.answered = bool(answer)
        return answer[0] if answer else None


def judge(rank: int, other: int, size: int, look: Look, *, closed: bool) -> Verdict:
    """Follow those who wait for each other from `rank`, which waits for `other`. closed: a connection was, so somebody
    has ended or failed, though it may not show yet."""
    until = time.monotonic() + ROLL_CALL_SECONDS
    while True:
        verdict, settled = _follow(rank, other, size, look)
        if settled or not closed or time.monotonic() > until:
            return verdict
        time.sleep(0.05)


def _follow(rank: int, other: int, size: int, look: Look) -> tuple[Verdict, bool]:
    """A verdict, and whether it is of a rank that will certainly not answer."""
    chain, at = [rank], other
    while True:
        seen = look(at)
        if isinstance(seen, str):
            return Verdict(at, seen, tuple(chain)), True
        onward = seen.waits or (seen.phase == FAILED and 0 <= seen.other != at)
        if not onward:
            return Verdict(at, f"it {seen}", tuple(chain)), seen.phase in (FAILED, LEFT)
        chain.append(at)
        if seen.other in chain:
            break
        at = seen.other
    if seen.phase == FAILED:  # it gave up waiting for a rank that waits, or works
        return Verdict(at, f"it gave up: {seen.what}" if seen.what else "it gave up", tuple(chain[:-1])), True
    return _out_of_step(chain[chain.index(seen.other) :], size, look, chain), False


def _out_of_step(circle: list[int], size: int, look: Look, chain: list[int]) -> Verdict:
    """Ranks that wait for each other make different calls: at fault is who does what fewest do."""
    seen = {rank: look(rank) for rank in range(size)}
    steps = {rank: did.step for rank, did in seen.items() if isinstance(did, Activity)}
    count = Counter(steps.values())
    odd = min(circle, key=lambda at: (count[steps[at]] if at in steps else 0, at == chain[0]))
    told = "; ".join(f"rank {at} {did if isinstance(did, Activity) else f': {did}'}" for at, did in seen.items())
    return Verdict(odd, f"the ranks make different calls of this group: {told}", tuple(chain))
