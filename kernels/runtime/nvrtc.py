"""CUDA C++ without a compiler on the user's machine: NVRTC, through cuda-core, at first use.

What is compiled is kept on disk (leetdist.kernels.runtime.settings says where), under the hash of all that
decides it: source, options, architecture and NVRTC's version.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import stat
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from leetdist.kernels.runtime.settings import cache_folder

SOURCES = Path(__file__).parents[1]  # kernels/


@cache
def version() -> tuple[int, int] | None:
    """NVRTC's; None if it or cuda-core cannot be imported (`pip install leetdist[cuda]`)."""
    try:
        importlib.import_module("cuda.core")
        _, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError):
        return None
    return int(major), int(minor)


def cubin(source: str, architecture: str, defines: tuple[tuple[str, int], ...]) -> bytes:
    """Machine code of `kernels/<source>` for an architecture such as "sm_90", from the cache or from NVRTC."""
    from cuda.bindings import nvrtc

    code = text(source)
    described = (code, architecture, defines, nvrtc.nvrtcVersion())
    path = cache_folder() / f"{hashlib.sha256(repr(described).encode()).hexdigest()[:32]}.cubin"
    kept = _kept(path)
    if kept is not None:
        return kept
    made = compiled(code, architecture, defines)
    _keep(path, made)
    return made


def compiled(
    code: str, architecture: str, defines: tuple[tuple[str, int], ...], *, logs: Any = None, **more: Any
) -> bytes:
    """The same of a source, anew. logs: a file that NVRTC writes to; more: options of cuda-core's."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        std="c++17",
        arch=architecture,
        define_macro=[(name, str(value)) for name, value in defines] or None,
        device_as_default_execution_space=True,  # lambdas that are templates cannot say so
        **more,
    )
    return bytes(Program(code, "c++", options).compile("cubin", logs=logs).code)


def text(source: str) -> str:
    """The source with what it includes, wherever beside it that is."""
    path = SOURCES / source
    return re.sub(
        r'^#include "(.*)"$', lambda found: text(str(path.parent / found[1])), path.read_text(), flags=re.MULTILINE
    )


MAGIC = b"leetdist cubin 1\n"  # then the SHA-256 of what follows, and that


def _kept(path: Path) -> bytes | None:
    """What `_keep` wrote, if it can be trusted to run: whole, and written by this user (or the system's), whom alone
    its folder lets write."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not (_own(os.stat(path.parent)) and _own(os.fstat(handle))):
                warnings.warn(
                    f"leetdist: {path.parent} can be written by other users, so compiled kernels in it are not used; "
                    f"chmod go-w it, or name another folder with LEETDIST_CACHE",
                    stacklevel=2,
                )
                return None
            content = file.read()
    except OSError:
        return None
    body = content[len(MAGIC) + 32 :]
    return body if body and content == MAGIC + hashlib.sha256(body).digest() + body else None


def _own(about: os.stat_result) -> bool:
    """Whether nobody else can have written it."""
    return about.st_uid in (os.geteuid(), 0) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _keep(path: Path, content: bytes) -> None:
    """Written beside and renamed: several processes may compile the same thing. A full or read-only disk costs no more
    than the next compilation."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # a name nobody guesses, mode 600
            file.write(MAGIC + hashlib.sha256(content).digest() + content)
        os.replace(file.name, path)
