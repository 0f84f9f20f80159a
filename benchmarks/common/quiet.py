"""What else the process does, kept away from what is timed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector waits, as in timeit: it would fall on whoever is at it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
