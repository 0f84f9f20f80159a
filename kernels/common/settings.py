"""What the environment says about kernels; nothing else reads these variables.

    LEETDIST_BACKEND=torch    PyTorch's kernels only
    LEETDIST_BACKEND=triton   Triton's wherever there are some, none in CUDA C++; on the CPU in Triton's interpreter,
                              for which TRITON_INTERPRET=1 must be set too
    LEETDIST_HOPPER=0         no kernels written for Hopper (sm_90); they round otherwise than the general ones
    LEETDIST_CACHE=folder     where compiled CUDA C++ is kept (else leetdist/ in XDG_CACHE_HOME or ~/.cache)

The first two decide on a result's last bits, so the ranks of a group compare what they lead to.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

BACKENDS = ("torch", "triton")


class Settings(NamedTuple):
    """backend: "torch", "triton" or None for the best there is."""

    backend: str | None
    hopper: bool
    interpreted: bool


def raw_settings() -> tuple[str | None, ...]:
    """What decides on kernels, as it is: a key for what is remembered, cheap enough for every call."""
    get = os.environ.get
    return get("LEETDIST_BACKEND"), get("LEETDIST_HOPPER")


def settings() -> Settings:
    """ValueError where a variable has no value that it may have."""
    return _settings(*raw_settings(), os.environ.get("TRITON_INTERPRET"))


@cache
def _settings(backend: str | None, hopper: str | None, interpret: str | None) -> Settings:
    if backend not in (None, *BACKENDS):
        raise ValueError(f"LEETDIST_BACKEND must be {' or '.join(BACKENDS)}, got {backend!r}")
    if hopper not in (None, "0", "1"):
        raise ValueError(f"LEETDIST_HOPPER must be 0 or 1, got {hopper!r}")
    return Settings(backend, hopper != "0", interpret == "1")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    wanted = os.environ.get("LEETDIST_CACHE")
    if wanted:
        return Path(wanted)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leetdist"
