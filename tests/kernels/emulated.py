"""The CUDA C++ kernels for Hopper on a machine without a GPU: compiled by the host's compiler for emulated_hopper.h."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from leetdist.kernels.constant_decay.cuda import grouped, launches, open_chunk, pieces, rows
from leetdist.kernels.runtime import cuda_launch, nvrtc, tensor_map
from leetdist.kernels.token_decay.cuda import shared, shared_gradients

HERE = Path(__file__).parent
HEADERS = "constant_decay/cuda/hopper.cuh", "constant_decay/cuda/hopper_warp.cuh"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # until the process ends


@cache
def compiler() -> tuple[str, ...]:
    """The host's C++ compiler with its options, and what all kernels include, compiled once."""
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("needs a C++ compiler")
    command = (
        found,
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-fno-gnu-unique",
        "-std=c++17",
        "-fPIC",
        "-w",
        "-Wno-psabi",
        "-ffp-contract=off",
    )
    included = Path(_folder().name, "emulated_cuda.h")
    subprocess.run([*command, "-x", "c++-header", str(HERE / included.name), "-o", f"{included}.gch"], check=True)
    return (*command, "-shared", "-include", str(included))


@cache
def library_of(source: str, name: str, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    made = Path(_folder().name, hashlib.sha256(repr((source, defines)).encode()).hexdigest()[:16])
    text = nvrtc.text(source)
    for header in HEADERS:
        text = text.replace(nvrtc.text(header), "")
    made.with_suffix(".cuh").write_text(text)
    macros = [f"-D{macro}={value}" for macro, value in (*defines, ("KERNEL", name), ("TEXT", f'"{made}.cuh"'))]
    subprocess.run([*compiler(), *macros, str(HERE / "emulated_hopper.cpp"), "-o", f"{made}.so"], check=True)
    return ctypes.CDLL(f"{made}.so")


def _kernel(source: str, name: str, device: Any, defines: Any, *, shared_memory: int, features: str) -> Any:
    assert features == "a"
    library = library_of(source, name, defines)

    def launch(grid: tuple[int, ...], block: int, *arguments: Any) -> None:
        held = cuda_launch.Arguments(arguments)
        x, y = (*grid, 1)[:2]
        library.run(
            ctypes.c_void_p(held.places), ctypes.c_uint(x), ctypes.c_uint(y), ctypes.c_int(block),
            ctypes.c_int(shared_memory),
        )  # fmt: skip

    return launch


def _encode(address: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> bytes | None:
    if address % 16 or any(x % 8 or x < 1 for x, size in zip(strides[:3], shape, strict=False) if size > 1):
        return None
    strides_ = (2 * stride for stride in strides[:3])
    made = tensor_map.TensorMap(struct.pack("=16q", address, *strides_, shape[2], shape[3], *[0] * 10))
    made.address, made.kind = address, (dtype, shape, strides)
    return made


def near() -> None:
    """Tensors that are made from here on lie in one heap, near enough to each other for one map of all pieces."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("needs glibc")
    ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


@contextmanager
def emulated(multiprocessors: int = 132) -> Iterator[None]:
    """The launches of the kernels for Hopper run on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_map, "_maps", {})
        patch.setattr(tensor_map, "_encode", _encode)
        patch.setattr(cuda_launch, "multiprocessors", lambda device: multiprocessors)
        patch.setattr(cuda_launch, "kernel", _kernel)
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    launches.kernel.cache_clear()
    for module in (grouped, open_chunk, pieces, rows, shared, shared_gradients):
        module._kernel.cache_clear()
    open_chunk._rows.cache_clear()


class Driver:
    """Launches emulated kernels as the driver does, and counts."""

    def __init__(self) -> None:
        self.launches = 0

    def __call__(self, library: Any, x: int, y: int, z: int, block: int, *more: Any) -> tuple[int]:
        _, _, shared_memory, _, places, _ = more
        self.launches += 1
        library.run(ctypes.c_void_p(places), ctypes.c_uint(x), ctypes.c_uint(y), block, shared_memory)
        return (0,)

    def kernel(self, source: str, name: str, device: Any, defines: Any, *, shared_memory: int, features: str) -> Any:
        library = library_of(source, name, defines)
        return cuda_launch.Kernel(torch.device("cuda", 0), library, shared_memory, None, self)


@contextmanager
def repeating(multiprocessors: int = 132) -> Iterator[Driver]:
    """`emulated`, where launches go through the loader's own kernels, and are recorded and repeated."""
    from leetdist.kernels.runtime import replay

    driver = Driver()
    with emulated(multiprocessors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_launch, "kernel", driver.kernel)
        patch.setattr(cuda_launch, "bind", lambda: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        patch.setattr(replay.triton_launch, "direct", lambda device: True)
        patch.setattr(replay, "_once", {})
        patch.setattr(replay, "_kinds", {})
        yield driver
