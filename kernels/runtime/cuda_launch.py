"""Launching a kernel in CUDA C++: on its device once a process, its arguments as the driver takes them."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from leetdist.kernels.runtime import recording
from leetdist.kernels.runtime.nvrtc import cubin

_thread = threading.local()


@cache
def kernel(
    source: str,
    name: str,
    device: torch.device,
    defines: tuple[tuple[str, int], ...],
    *,
    shared_memory: int = 0,
    features: str = "",
) -> Kernel:
    """A kernel of `kernels/<source>`, compiled and on the device.

    shared_memory: bytes a block asks for at launch; features: "a" for instructions that one architecture alone has.
    """
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    major, minor = torch.cuda.get_device_capability(device)
    torch.cuda.current_stream(device)  # makes torch's context, which cuda-core then shares
    Device(device.index).set_current()
    _thread.bound = device.index
    module = ObjectCode.from_cubin(cubin(source, f"sm_{major}{minor}{features}", defines))
    found = module.get_kernel(name).handle
    if shared_memory:
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuKernelSetAttribute(most, shared_memory, found, driver.CUdevice(device.index))[0])
    result, handle = driver.cuKernelGetFunction(found)
    check(result)
    return Kernel(device, handle, shared_memory, module, driver.cuLaunchKernel)


@dataclass(eq=False)
class Kernel:
    """`kernel(grid, block, *arguments)` launches it on its device's current stream.

    Arguments: an int is 64 bits wide (an address or a number), a float is 32, bytes are a structure of whole words of
    64. Every call gives the same kinds in the same places.
    """

    device: torch.device
    handle: Any
    shared_memory: int
    module: Any  # lives as long as its kernel
    driver: Callable[..., tuple[Any]]
    arguments: Arguments | None = None

    def __call__(self, grid: tuple[int, ...], block: int, *arguments: Any) -> None:
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self(grid, block, *arguments)
        bind()
        if recording.noting():
            recording.note(recording.CudaLaunch(self, grid, block, arguments))
        if self.arguments is None:
            self.arguments = Arguments(arguments)
        self.arguments.fill(arguments)
        x, y, z = (*grid, 1, 1)[:3]
        return self.launch((x, y, z), block, torch._C._cuda_getCurrentRawStream(self.device.index), self.arguments)

    def launch(self, grid: tuple[int, int, int], block: int, stream: int, arguments: Arguments) -> None:
        """The same on a stream, where the device is the current one and bound."""
        check(self.driver(self.handle, *grid, block, 1, 1, self.shared_memory, stream, arguments.places, 0)[0])


class Arguments(threading.local):
    """Memory of each thread's own for a kernel's arguments, as words of 64 bits, and the address of the array of their
    addresses, which a launch takes. `offsets`: where an argument begins, in words."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        kinds = ("f4x" if isinstance(x, float) else f"{len(x)}s" if isinstance(x, bytes) else "q" for x in arguments)
        self.values = struct.Struct("=" + "".join(kinds))
        lengths = [len(x) // 8 if isinstance(x, bytes) else 1 for x in arguments]
        self.offsets = list(accumulate(lengths, initial=0))
        self.memory = ctypes.create_string_buffer(self.values.size)
        self.words = memoryview(self.memory).cast("B").cast("q")
        begin = ctypes.addressof(self.memory)
        self.array = (ctypes.c_void_p * len(lengths))(*(begin + 8 * offset for offset in self.offsets[:-1]))
        self.places = ctypes.addressof(self.array)
        self.fill(arguments)

    def fill(self, arguments: Sequence[Any]) -> None:
        self.values.pack_into(self.memory, 0, *arguments)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def bind() -> None:
    """The driver wants a current context, and a thread of autograd's, say, that did nothing yet has none."""
    index = torch.cuda.current_device()
    if getattr(_thread, "bound", None) != index:
        from cuda.core import Device

        Device(index).set_current()
        _thread.bound = index


def check(result: Any) -> None:
    """RuntimeError if a call of the driver failed."""
    if int(result) != 0:
        raise RuntimeError(f"CUDA C++ kernel: the driver says {result!r}")
