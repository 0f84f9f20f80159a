"""What else the process does, kept away from what is timed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector waits. It falls on whoever is at it: one and the same call of 55 us took 80 to 90 in
    some minutes, and identical kernels differed by 11 %; without it by 2."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
