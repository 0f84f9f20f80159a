"""What the environment says about kernels; nothing else reads these variables.

    LEETDIST_BACKEND=torch    PyTorch's kernels only
    LEETDIST_BACKEND=triton   Triton's wherever there are some, none in CUDA C++; on the CPU in Triton's interpreter,
                              for which TRITON_INTERPRET=1 must be set too
    LEETDIST_HOPPER=0         no kernels written for Hopper (sm_90); they round otherwise than the general ones
    LEETDIST_CACHE=folder     where compiled CUDA C++ is kept (else leetdist/ in XDG_CACHE_HOME or ~/.cache)

The first two decide on a result's last bits, so the ranks of a group compare what they lead to; and what Triton itself
takes from the environment (`compiler_settings`).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

BACKENDS = ("torch", "triton")
# By these Triton makes other code of the same source, on NVIDIA GPUs: triton/knobs.py and what its own cache goes by
# (`get_cache_invalidating_env_vars`), releases 3.5 to 3.9. Not TRITON_DEFAULT_FP_FUSION: each of our launches says
# whether it fuses (leetdist.kernels.runtime.triton_launch).
OF_TRITON = (
    "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "PTXAS_OPTIONS", "DISABLE_PTXAS_OPT", "TRITON_LIBDEVICE_PATH",
    "DISABLE_LLVM_OPT", "LLVM_PASS_PLUGIN_PATH", "TRITON_PLUGIN_PATHS", "TRITON_FORCE_DISABLE_FP_FUSION",
    "TRITON_F32_DEFAULT", "DISABLE_MMA_V3", "DISABLE_MMA_V5", "ALLOW_LHS_TMEM_LAYOUT_CONVERSION",
    "TRITON_OVERRIDE_ARCH", "TRITON_MOCK_PTX_VERSION", "TRITON_KERNEL_OVERRIDE", "TRITON_ENABLE_ASAN",
    "TRITON_INSTRUMENTATION_MODE", "TRITON_ENABLE_EXPERIMENTAL_CONSAN",
)  # fmt: skip


class Settings(NamedTuple):
    """backend: "torch", "triton" or None for the best there is."""

    backend: str | None
    hopper: bool
    interpreted: bool


def raw_settings() -> tuple[str | None, ...]:
    """What decides on kernels, as it is: a key for what is remembered, cheap enough for every call."""
    return variable("LEETDIST_BACKEND"), variable("LEETDIST_HOPPER")


def variable(name: str) -> str | None:
    """`os.environ.get(name)`, which raises and catches two errors where there is no such variable: 0.8 us of a call."""
    known = getattr(os.environ, "_data", None)
    if os.name == "posix" and type(known) is dict and name.encode() not in known:
        return None
    return os.environ.get(name)


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


def compiler_settings() -> tuple[tuple[str, str], ...]:
    """The variables that Triton compiles by and that are set, with their values as they are. Ranks compare them: one
    that adds without fused multiply-adds has other bits."""
    environ = os.environ
    return tuple((name, environ[name]) for name in OF_TRITON if name in environ)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    wanted = os.environ.get("LEETDIST_CACHE")
    if wanted:
        return Path(wanted)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leetdist"
