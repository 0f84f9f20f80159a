"""The mailboxes of virtual ranks, used by their threads at once, and by calls that do not belong together."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

import leetdist
from leetdist.launch.model import Config, LanguageModel
from leetdist.sequence.virtual import _Hub


class Slow(defaultdict[Any, deque[Any]]):
    """Another thread has its turn while a box is being made."""

    def __missing__(self, key: Any) -> deque[Any]:
        box: deque[Any] = deque()
        time.sleep(0.1)
        self[key] = box
        return box


def test_a_box_is_made_once() -> None:
    """Two ranks that come at once to a box that nobody has used: what one puts there, the other finds."""
    hub = _Hub(2)
    hub.boxes = Slow()
    sender = threading.Thread(target=hub.put, args=(0, 1, "message", "object"))
    sender.start()
    time.sleep(0.03)  # the receiver finds no box either, and makes its own later
    try:
        assert hub.take(0, 1, "a message", "object", 2.0) == "message"
    finally:
        sender.join()


def attends(group: Any) -> None:
    x = torch.randn(1, 2, 64, 16)
    leetdist.linear_attention(x, x, x, group=group)


CALLS: dict[str, Callable[[Any], Any]] = {
    "linear_attention": attends,
    "gather_sequence": lambda group: leetdist.gather_sequence(torch.zeros(1, 64, 8), 1, group),
    "halo": lambda group: leetdist.halo(torch.zeros(1, 64, 8), 1, group, width=2),
    "causal_conv1d": lambda group: leetdist.nn.causal_conv1d(torch.zeros(1, 64, 8), torch.zeros(8, 4), group=group),
    "shard_batch": lambda group: leetdist.shard_batch({"input_ids": torch.zeros(1, 64, dtype=torch.int64)}, group),
    "reduce_loss": lambda group: leetdist.reduce_loss(torch.tensor(2.0), 3, group),
    "stream": lambda group: leetdist.stream(tile=16, group=group).push(*torch.zeros(3, 1, 2, 64, 16)),
    "prefill": lambda group: leetdist.Session(MODEL, group).prefill(torch.zeros(1, 64, dtype=torch.int64)),
}
MODEL = LanguageModel(Config(dim=32, layers=1, heads=2, hidden=64))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("pair", list(itertools.combinations(CALLS, 2)), ids="-".join)
def test_two_calls_at_once_are_told_from_each_other(pair: tuple[str, str], ranks: int) -> None:
    """Neither takes for its own what the other says, nor waits for it in vain."""
    words = "makes another call of the group: it asks for|the ranks make different calls of the group: rank"
    begin = time.monotonic()
    with pytest.raises((ValueError, RuntimeError), match=words):
        leetdist.virtual_ranks(lambda group: CALLS[pair[group.rank == 1]](group), ranks)
    assert time.monotonic() - begin < 5


REFUSED: dict[str, Callable[[Any], Any]] = {
    "stream": lambda group: leetdist.stream(tile=16, group=group).push(*torch.zeros(2, 1, 2, 64, 16), torch.zeros(1)),
    "prefill": lambda group: leetdist.Session(MODEL, group).prefill(torch.zeros(1, 0, dtype=torch.int64)),
}
WORDS = {"stream": "v must ", "prefill": "tokens: N is 0"}


@pytest.mark.parametrize("call", ["shard_batch", "reduce_loss", "stream", "prefill"])
@pytest.mark.parametrize("refused", list(REFUSED))
def test_what_one_call_refuses_is_told_in_another(refused: str, call: str) -> None:
    def rank(group: Any) -> str:
        with pytest.raises(ValueError, match=WORDS[refused]) as raised:
            (CALLS[call] if group.rank else REFUSED[refused])(group)
        return str(raised.value)

    first, second = leetdist.virtual_ranks(rank, 2)
    assert second.endswith(f": {first}")


def test_ranks_that_wait_in_a_ring_are_told() -> None:
    def rank(group: Any) -> None:
        group.receive(torch.empty(1), (group.rank + 1) % group.size, "a word")

    with pytest.raises(
        RuntimeError, match=r"rank . waits for rank . for a word; rank . waits for rank . for a word; rank"
    ):
        leetdist.virtual_ranks(rank, 3)


@pytest.mark.parametrize("seconds", [1e10, 1e30])
def test_a_timeout_that_no_wait_can_have_is_refused(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(group: Any) -> None:
        with leetdist.sequence_parallel(group, timeout=seconds):
            attends(group)

    with pytest.raises(ValueError, match="timeout must be at most 1,000,000,000 seconds"):
        leetdist.virtual_ranks(rank, 2)
    monkeypatch.setenv("LEETDIST_TIMEOUT", str(seconds))
    with pytest.raises(ValueError, match="LEETDIST_TIMEOUT must be at most 1,000,000,000 seconds"):
        leetdist.virtual_ranks(attends, 2)
    monkeypatch.setenv("LEETDIST_TIMEOUT", "1e9")
    leetdist.virtual_ranks(attends, 2)
