"""The line of a program that makes a call: what ranks compare, and what a warning names.

Ranks' calls are paired in the order in which each makes them. Two calls of equal shapes that one rank makes in another
order, or of which it leaves one out, would be taken for each other without a word; so ranks compare where calls come
from. They are told by a warning, as a program may well make one call in two places (`if rank == 0: ... else: ...`).
"""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from typing import NamedTuple

import torch

from leetdist.kernels.runtime.memo import Memo

_INNER = ("leetdist.", "torch.")  # modules that lie between a program's line and the group


class Site(NamedTuple):
    """number: the same in all processes, and positive; words: file, line and function."""

    number: int
    words: str


_known: Memo[tuple[str, int], Site] = Memo(4096)


def calling_site() -> Site | None:
    """Where the program calls leetdist now; None where no line of it is on the stack (a thread of autograd's)."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", _INNER[0]).startswith(_INNER):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    key = frame.f_code.co_filename, frame.f_lineno
    site = _known.get(key)
    if site is None:
        # The same program may lie in another folder on another host.
        words = f"{os.path.basename(key[0])}:{key[1]} ({frame.f_code.co_name})"
        site = _known[key] = Site(1 + zlib.crc32(words.encode()), words)
    return site


def warn(words: str, kind: type[Warning] = UserWarning) -> None:
    """A warning of the program's line, whatever of leetdist lies between; none from a graph that is traced, which could
    not be one graph then."""
    if torch.compiler.is_compiling():
        return
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", _INNER[0]).startswith(_INNER):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(words, kind, stacklevel=depth)


def warn_of(sites: list[str]) -> None:
    """The ranks, in rank order, are in a call from these."""
    other = next(rank for rank, site in enumerate(sites) if site != sites[0])
    warn(
        f"leetdist: rank {other} makes this call in {sites[other]}, rank 0 in {sites[0]}. The calls of a group are "
        "paired in the order in which each rank makes them: if these are two calls, each rank gets a part of the "
        "other's result. (Said once for these lines.)",
        RuntimeWarning,
    )
