"""Who watches NCCL's own calls: when it ends a process, what it tells before, and what it leaves alone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leetdist.sequence import watch
from leetdist.sequence.watch import Watch
from nccl_standin import Event, until

CPU = torch.device("cpu")


class Messages:
    """What a watch asks, of a transport that answers at once."""

    device = CPU

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.seconds, self.cause = 0.2, None

    def limit(self) -> float:
        return self.seconds

    def say_waits(self, messages: dict[str, int]) -> None:
        self.said.append(messages)

    def say_goes_on(self) -> None:
        self.said.append("goes on")

    def broken(self) -> str | None:
        return self.cause

    def verdict(self, messages: dict[str, int], seconds: float, cause: str) -> str:
        return f"{messages}: {cause}"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Messages, list[str]]]:
    monkeypatch.setattr(watch, "SECONDS", 0.02)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "stuck", False)
    ends: list[str] = []

    def end(self: Watch, words: str) -> None:
        ends.append(words)
        self.stop()

    monkeypatch.setattr(Watch, "end", end)
    messages = Messages()
    made = Watch(messages)
    yield made, messages, ends
    made.stop()
    if made.thread is not None:
        made.thread.join(5)
        assert not made.thread.is_alive()


def test_the_watch_ends_what_does_not(
    watched: tuple[Watch, Messages, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, messages, ends = watched
    monkeypatch.setattr(Event, "stuck", True)
    begin = time.monotonic()
    made.note({"for a state": 4})
    until(lambda: ends)
    assert 0.2 <= time.monotonic() - begin < 2
    assert ends[0].startswith("{'for a state': 4}: NCCL: no end of what was sent and received in 0.")
    assert messages.said[0] == {"for a state": 4}  # before: the others know whom this rank waits for


def test_the_watch_lets_what_ends(watched: tuple[Watch, Messages, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Late, but in time; then there is nothing to watch, and it sleeps until there is."""
    made, messages, ends = watched
    messages.seconds = 30.0
    monkeypatch.setattr(Event, "stuck", True)
    made.note({"for a state": 4})
    until(lambda: messages.said)
    monkeypatch.setattr(Event, "stuck", False)
    until(lambda: messages.said[-1] == "goes on")
    until(lambda: made.asleep)
    time.sleep(0.1)
    assert made.asleep
    monkeypatch.setattr(Event, "stuck", True)
    made.note({"for another": 5})
    until(lambda: messages.said[-1] == {"for another": 5})
    messages.cause = "NCCL: error 6"
    until(lambda: ends)
    assert ends == ["{'for another': 5}: NCCL: error 6"]


@pytest.mark.parametrize("stuck", [False, True])
def test_what_has_come_through_is_not_named(stuck: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two messages between two looks: the first is named only where it may be the one that does not come."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "stuck", stuck)
    made = Watch(Messages())
    made.thread = threading.current_thread()  # nobody looks in between
    made.note({"to take a state": 4})
    made.note({"for a gradient": 5})
    assert made.messages() == ({"to take a state": 4, "for a gradient": 5} if stuck else {"for a gradient": 5})


def test_the_watch_ends_the_process_whoever_is_at_fault(
    watched: tuple[Watch, Messages, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, messages, ends = watched

    def unknown(*args: Any) -> str:
        raise KeyError("the group has ended")

    monkeypatch.setattr(messages, "verdict", unknown)
    monkeypatch.setattr(Event, "stuck", True)
    made.note({"for a state": 4})
    until(lambda: ends)
    assert "no end of what was sent" in ends[0]
    assert ends[0].endswith("who does not answer is not known: KeyError: 'the group has ended'")


def test_the_time_of_a_stopped_process_does_not_count(
    watched: tuple[Watch, Messages, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, messages, ends = watched
    monkeypatch.setattr(watch, "STOPPED", 1.0)
    messages.seconds = 1.0
    monkeypatch.setattr(Event, "stuck", True)
    stops = iter([2.0])
    monkeypatch.setattr(messages, "broken", lambda: time.sleep(next(stops, 0.0)))
    begin = time.monotonic()
    made.note({"for a state": 4})
    until(lambda: ends, 20)
    assert time.monotonic() - begin > 3


def test_messages_are_told_while_the_watch_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    made = Watch(Messages())
    made.newest.messages = {"for a state": 4}
    locked: list[bool] = []

    class Looked(Watch):
        @property
        def newest(self) -> Any:
            locked.append(self.lock.locked())
            return vars(self)["newest"]

        @newest.setter
        def newest(self, mark: Any) -> None:
            vars(self)["newest"] = mark

    made.__class__ = Looked
    assert made.messages() == {"for a state": 4}
    assert locked == [True]  # or what is watched may be no more between two looks at it


def test_events_are_on_the_stream_of_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the current device is another."""
    recorded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    event: Any = SimpleNamespace(record=recorded.append)
    watch.record(event, torch.device("cuda", 1))
    watch.record(event, CPU)
    assert recorded == [("stream of", torch.device("cuda", 1)), None]


def test_an_error_on_its_way_stops_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended the process"))
    made = Watch(Messages())
    made.stop()
    made.note({"for a state": 4})
    made.end("words")
    assert made.thread is None
