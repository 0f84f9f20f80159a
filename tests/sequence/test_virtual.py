"""The mailboxes of virtual ranks, used by their threads at once."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from typing import Any

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
