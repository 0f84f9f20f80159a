"""CUDA C++ without a compiler on the user's machine: NVRTC, through cuda-core, at first use.

What is compiled is kept on disk (LEETDIST_CACHE, or leetdist/ in the user's cache folder), under the hash of all that
decides it: source, options, architecture and NVRTC's version.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent


@cache
def available() -> bool:
    """Whether cuda-core and NVRTC can be imported (`pip install leetdist[cuda]`)."""
    try:
        importlib.import_module("cuda.core")
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError):
        return False
    return True


def cubin(source: str, architecture: str, defines: tuple[tuple[str, int], ...]) -> bytes:
    """Machine code of `kernels/cuda/<source>` for an architecture such as "sm_90", from the cache or from NVRTC."""
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    code = (SOURCES / source).read_text()
    described = (code, architecture, defines, nvrtc.nvrtcVersion())
    path = cache_folder() / f"{hashlib.sha256(repr(described).encode()).hexdigest()[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    options = ProgramOptions(
        std="c++17", arch=architecture, define_macro=[(name, str(value)) for name, value in defines]
    )
    made = bytes(Program(code, "c++", options).compile("cubin").code)
    _keep(path, made)
    return made


def cache_folder() -> Path:
    wanted = os.environ.get("LEETDIST_CACHE")
    if wanted:
        return Path(wanted)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leetdist"


def _keep(path: Path, content: bytes) -> None:
    """Written beside and renamed: several processes may compile the same thing. A full or read-only disk costs no more
    than the next compilation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass


@cache
def kernel(source: str, name: str, device: torch.device, defines: tuple[tuple[str, int], ...]) -> Callable[..., None]:
    """`launch(grid, block, *arguments)`, on the device's current stream.

    Arguments: an int is 64 bits wide (an address or a number), a float is 32; None is the null address.
    """
    import ctypes

    from cuda.core import Device, LaunchConfig, ObjectCode, launch

    major, minor = torch.cuda.get_device_capability(device)
    torch.cuda.current_stream(device)  # makes torch's context, which cuda-core then shares
    Device(device.index).set_current()
    module = ObjectCode.from_cubin(cubin(source, f"sm_{major}{minor}", defines))
    function = module.get_kernel(name)

    def run(grid: tuple[int, ...], block: int, *arguments: Any) -> None:
        with torch.cuda.device(device):
            Device(device.index).set_current()  # a thread of autograd's may have no context yet
            stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
            launch(
                stream,
                LaunchConfig(grid=grid, block=block),
                function,
                *(ctypes.c_float(x) if isinstance(x, float) else x or 0 for x in arguments),
            )

    return run


class _Stream:
    """A stream of torch's, in the protocol that cuda-core understands."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle
