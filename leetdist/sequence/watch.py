"""Who ends the process where a message that no host waits for never comes through, as PyTorch's watchdog does for its
own: a thread that looks once a second at an event behind the messages of a pass, and sleeps where there are none."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from contextlib import suppress
from typing import Protocol

import torch

SECONDS = 1.0  # between two looks
LATE = 2  # looks after which the other ranks are told whom this one waits for
STOPPED = 10.0  # between two looks: the process did not run, and maybe the others' did not
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Watched(Protocol):
    """Whose messages they are. `messages`: in words, and the other rank."""

    device: torch.device

    def limit(self) -> float:
        """Seconds that a message may take."""

    def say_waits(self, messages: dict[str, int]) -> None:
        """Tell the other ranks that one of these has not come through."""

    def say_goes_on(self) -> None:
        """They have."""

    def broken(self) -> str | None:
        """What has gone wrong beneath, if anything."""

    def verdict(self, messages: dict[str, int], seconds: float, cause: str) -> str:
        """Who is at fault, after so many seconds."""


def record(event: torch.cuda.Event, device: torch.device) -> None:
    """Behind what its current stream has been given. The current device may be another."""
    event.record(torch.cuda.current_stream(device) if device.type == "cuda" else None)


class Mark:
    """An event behind messages, and when it was recorded; 0.0: not yet."""

    def __init__(self) -> None:
        self.event, self.since = torch.cuda.Event(), 0.0
        self.messages: dict[str, int] = {}


class Watch:
    """Over the messages of one transport. All since the last look are behind one event, which is recorded anew after
    each message: so one that comes too late is seen two looks after its time at most. After each, and not after a pass,
    whose host may stand still before its end, where it waits for the GPU."""

    def __init__(self, transport: Watched) -> None:
        self.transport, self.newest = transport, Mark()
        self.watched: Mark | None = None
        self.wake, self.asleep, self.stopped = threading.Event(), False, False
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()  # between a message with its event, and who takes both

    def note(self, messages: dict[str, int]) -> None:
        """These have just been put on the current stream."""
        if self.stopped:
            return
        with self.lock:
            newest = self.newest
            if newest.event.query():  # those before have come through: nobody is to be told of them
                newest.messages.clear()
            newest.messages |= messages
            record(newest.event, self.transport.device)
            newest.since = time.monotonic()
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="leetdist watch", daemon=True)
            self.thread.start()
        elif self.asleep:
            self.wake.set()

    def stop(self) -> None:
        self.stopped = True
        self.wake.set()

    def messages(self) -> dict[str, int]:
        """All that may not have come through."""
        with self.lock:
            return {**(self.watched.messages if self.watched is not None else {}), **self.newest.messages}

    def _run(self) -> None:
        self._begin()
        said, looked = False, time.monotonic()
        with suppress(RuntimeError):  # the GPU's own, which every call of the program's then gets too
            while not self.stopped:
                late, before, looked = self._look(), looked, time.monotonic()
                if late is not None:
                    if looked - before > STOPPED:
                        late.since += looked - before
                    said = self._late(late) or said
                elif said:
                    self.transport.say_goes_on()
                    said = False
                self._sleep(idle=self.watched is None)

    def _look(self) -> Mark | None:
        """What was watched, if it has not come through. If it has, what is newest takes its place."""
        with self.lock:
            if self.watched is not None and not self.watched.event.query():
                return self.watched
            self.watched = None
            if self.newest.since:
                self.watched, self.newest = self.newest, Mark()
            return None

    def _sleep(self, *, idle: bool) -> None:
        self.asleep = idle
        if not (idle and self.newest.since):  # which a pass may have marked in between
            self.wake.wait(None if idle else SECONDS)
        self.asleep = False
        if not self.stopped:
            self.wake.clear()

    def _late(self, watched: Mark) -> bool:
        """Whether the other ranks were told so. Too late, it is the end."""
        seconds, messages = time.monotonic() - watched.since, self.messages()
        if seconds < LATE * SECONDS:
            return False
        self.transport.say_waits(messages)
        cause, limit = self.transport.broken(), self.transport.limit()
        if cause is None and seconds > limit:
            cause = f"NCCL: no end of what was sent and received in {seconds:.1f} s"
        if cause is not None and not self.stopped:
            try:
                words = self.transport.verdict(messages, seconds, cause)
            except Exception as error:  # nobody else ends the process
                words = f"leetdist: {cause}; who does not answer is not known: {type(error).__name__}: {error}"
            self.end(words)
        return True

    def end(self, words: str) -> None:
        """Of the process. Whoever waits for its GPU cannot be told in another way."""
        if self.stopped:  # an error is on its way to the program
            return
        os.write(2, f"{words}\n".encode())
        os._exit(1)

    def _begin(self) -> None:
        """In its thread: this rank's GPU, and leave to look at events while other threads capture graphs."""
        device = self.transport.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with suppress(OSError, AttributeError):
                ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))
