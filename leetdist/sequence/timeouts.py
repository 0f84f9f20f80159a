"""How long the calls of a process group wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def timeout_of(group: Any, device: str = "cpu") -> timedelta:
    """How long the calls of a group, or of gloo itself, on tensors of a device wait."""
    with contextlib.suppress(AttributeError, RuntimeError):
        options: Any = getattr(group, "options", None)  # of gloo itself, or of a group that has it
        timeout: timedelta = (options or group._get_backend(torch.device(device)).options)._timeout
        return timeout
    return c10d.default_pg_timeout


@contextlib.contextmanager
def limited(group: dist.ProcessGroup, seconds: float | None) -> Iterator[None]:
    """A group's calls on the host wait no longer than these seconds. A call cannot be told; and its thread, if only the
    host gave up, would keep the process from ending."""
    if seconds is None:
        yield
        return
    backend: Any = group._get_backend(torch.device("cpu"))
    before = timeout_of(group)
    backend._set_default_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        backend._set_default_timeout(before)
