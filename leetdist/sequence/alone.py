"""A call that is this rank's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from leetdist.sequence.group import _current


@contextmanager
def alone() -> Iterator[None]:
    """Calls inside are this rank's own, whatever `sequence_parallel` surrounds them."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


__all__ = ["alone"]
