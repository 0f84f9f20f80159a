"""Memory that the processes of one host share: without a name, so that nobody can guess it and nothing is left behind.

The first rank makes it (memfd_create); the others open it through /proc, which the kernel allows to the same user only.
It ends with the last process that has it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = 16  # bytes in front: another process may have the number that was told


def create(size: int) -> tuple[int, str]:
    """The descriptor of `size` bytes of shared memory, and what others open it by. OSError where there is none."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    handle = os.memfd_create("leetdist", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    secret = secrets.token_bytes(SECRET)
    os.ftruncate(handle, SECRET + size)
    os.pwrite(handle, secret, 0)
    with suppress(OSError):  # whoever maps a file that is cut short later ends with SIGBUS
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return handle, f"/proc/{os.getpid()}/fd/{handle}:{secret.hex()}"


def attach(address: str, size: int) -> memoryview:
    """The `size` bytes of another process, or this one. OSError or ValueError where they are not there, or not ours."""
    path, _, secret = address.rpartition(":")
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        about = os.fstat(handle)
        if about.st_uid != os.geteuid() or about.st_size != SECRET + size:
            raise ValueError(f"{path} is no memory of this user's, or of another size")
        memory = memoryview(mmap.mmap(handle, 0))
    finally:
        os.close(handle)
    if memory[:SECRET] != bytes.fromhex(secret):
        raise ValueError(f"{path} is not the memory that was meant")
    return memory[SECRET:]


@dataclass(frozen=True)
class Process:
    """A process of this host: its number, and when it began, because numbers are used again."""

    pid: int
    began: int

    @staticmethod
    def mine() -> Process:
        return Process(os.getpid(), Process._stat(os.getpid())[1])

    def state(self) -> str:
        """ "runs", "is stopped" (by a signal or a debugger) or "has ended". One that has ended may stay listed, as a
        zombie, until its parent looks."""
        letter, began = self._stat(self.pid)
        if began != self.began or letter in "ZX":
            return "has ended"
        return "is stopped" if letter in "Tt" else "runs"

    @staticmethod
    def _stat(pid: int) -> tuple[str, int]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            return fields[0], int(fields[19])
        except (OSError, IndexError, ValueError):
            return "X", -1


def shared(gather: Callable[[Any], list[Any]], rank: int, size: int) -> tuple[memoryview | None, list[Process]]:
    """`size` bytes that all ranks share, if they are on one host, else None; and the ranks' processes. They call this
    together. `gather` brings every rank's object to all ranks."""
    handle, address, memory = -1, "", None
    try:
        if rank == 0:
            with suppress(OSError):
                handle, address = create(size)
        mine = Process.mine()
        everyone = gather((address, mine.pid, mine.began))
        processes = [Process(*told) for _, *told in everyone]
        # Another host has no such memory; another container may have no such processes.
        with suppress(OSError, ValueError):
            if everyone[0][0] and all(process.state() != "has ended" for process in processes):
                memory = attach(everyone[0][0], size)
        everywhere = all(gather(memory is not None))
    finally:
        if handle >= 0:
            os.close(handle)  # the memory lives as long as it is mapped
    return memory if everywhere else None, processes
