"""One launch of a call that is repeated (leetdist.kernels.runtime.replay): what it passes on, and which of that are
addresses, known by the tensors that they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from leetdist.kernels.runtime import recording, triton_driver
from leetdist.kernels.runtime.cuda_launch import Arguments, Kernel
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.tensor_map import TensorMap, tensor_map


@dataclass(eq=False)
class Map:
    """The tensor map of one argument, for each address that it has had."""

    make: Callable[[int], Any]
    known: Memo[int, Any] = field(default_factory=lambda: Memo(256))  # allocators hand out the same few again

    def at(self, address: int) -> Any:
        found = self.known.get(address)
        if found is None:
            found = self.known[address] = self.make(address)
        return found


@dataclass(eq=False)
class CudaStep:
    """One launch of a kernel in CUDA C++, and where addresses (or numbers) and maps go among its arguments, in words of
    64 bits: the source of each, and bytes that are added to it."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    arguments: Arguments
    addresses: list[tuple[int, int, int]]
    maps: list[tuple[slice, int, int, Map]]

    def __call__(self, stream: int, sources: tuple[int, ...]) -> None:
        arguments = self.arguments
        words = arguments.words
        for place, source, after in self.addresses:
            words[place] = sources[source] + after
        for part, source, after, moved in self.maps:
            words[part] = moved.at(sources[source] + after)
        self.kernel.launch(self.grid, self.block, stream, arguments)


@dataclass(eq=False)
class TritonStep:
    """One launch, as Triton hands it to the driver, and where addresses and maps go among the kernel's arguments."""

    compiled: Any  # lives as long as it is launched: newer Tritons unload a kernel that nobody holds
    handed: triton_driver.Handed
    addresses: list[tuple[int, int, int]]
    maps: list[tuple[int, int, int, Map]]

    def __call__(self, stream: int, sources: tuple[int, ...]) -> None:
        handed = self.handed
        arguments = handed.arguments.copy()
        for place, source, after in self.addresses:
            arguments[place] = sources[source] + after
        for place, source, after, moved in self.maps:
            arguments[place] = moved.at(sources[source] + after)
        if handed.together:
            handed.function(*handed.before, stream, *handed.after, arguments)
        else:
            handed.function(*handed.before, stream, *handed.after, *arguments)


@dataclass(eq=False)
class LibraryStep:
    """One call of a library's function, and its addresses: the source of each, and bytes that are added to it."""

    function: Callable[..., None]
    addresses: list[tuple[int, int]]

    def __call__(self, stream: int, sources: tuple[int, ...]) -> None:
        self.function(stream, *[sources[source] + after for source, after in self.addresses])


class Unclear(Exception):
    """An address of which the call's tensors do not say where it will be in another call."""


class Sources:
    """The tensors that a call's addresses come from: `places` by address, counted from `first`."""

    def __init__(self, tensors: list[Tensor], first: int) -> None:
        self.places = {x.data_ptr(): place for place, x in enumerate(tensors, first)}
        self.memory: dict[int, tuple[int, Tensor | None]] = {}  # how long it is, and whose, if it is one tensor's
        for x in tensors:
            storage = x.untyped_storage()
            begin = storage.data_ptr()
            self.memory[begin] = storage.nbytes(), None if begin in self.memory else x

    def of(self, address: int) -> tuple[int, int] | None:
        """A tensor, and how far into it the address is; None where it is in none of them."""
        if address in self.places:
            return self.places[address], 0
        for begin, (size, x) in self.memory.items():
            if begin <= address < begin + size:
                if x is None or not 0 <= address - x.data_ptr() < extent(x):
                    raise Unclear
                return self.places[x.data_ptr()], address - x.data_ptr()
        return None


def extent(x: Tensor) -> int:
    """Bytes from the first number of x to the end of the last."""
    return x.itemsize * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def cuda_step(launched: recording.CudaLaunch, sources: Sources) -> CudaStep:
    x, y, z = (*launched.grid, 1, 1)[:3]
    arguments = Arguments(launched.arguments)
    step = CudaStep(launched.kernel, (x, y, z), launched.block, arguments, [], [])
    for place, end, argument in zip(arguments.offsets, arguments.offsets[1:], launched.arguments, strict=False):
        if isinstance(argument, TensorMap):
            found = sources.of(argument.address)
            if found is None:
                raise Unclear
            step.maps.append((slice(place, end), *found, Map(partial(_words, kind=argument.kind))))
        elif isinstance(argument, recording.Number):
            step.addresses.append((place, argument.source, 0))
        elif isinstance(argument, int) and (found := sources.of(argument)) is not None:
            step.addresses.append((place, *found))
    return step


def library_step(called: recording.LibraryCall, sources: Sources) -> LibraryStep:
    step = LibraryStep(called.function, [])
    for x in called.tensors:
        found = sources.of(x.data_ptr())
        if found is None:
            raise Unclear
        step.addresses.append(found)
    return step


def _words(address: int, kind: Any) -> memoryview:
    """A tensor's map, as words of 64 bits."""
    made = tensor_map(address, kind)
    assert made is not None  # the first had one, and addresses are a multiple of 16 for both or for neither
    return memoryview(made).cast("q")


def triton_step(launched: recording.TritonLaunch, sources: Sources, held: list[Tensor]) -> TritonStep:
    if launched.compiled is None or any(isinstance(x, recording.Number) for x in launched.arguments):
        raise Unclear  # only Triton knows; and it may have compiled for the number's value
    handed = triton_driver.handed(launched.compiled, launched.grid, launched.arguments)
    if handed is None:
        raise Unclear
    step = TritonStep(launched.compiled, handed, [], [])
    for number, (place, x) in enumerate(zip(handed.places, launched.arguments, strict=True)):
        base = x if isinstance(x, Tensor) else getattr(x, "base", None)
        if base is None:
            continue
        found = sources.of(base.data_ptr())
        if found is None:
            if base is not x:
                raise Unclear
            held.append(base)  # a table, say
            handed.arguments[place] = base.data_ptr()
            continue
        handed.arguments[place] = None
        if base is x:
            step.addresses.append((place, *found))
        else:
            bare = copy.copy(x)
            bare.base = None  # or the recorded call's tensor would live as long as its replay
            step.maps.append((place, *found, Map(partial(handed.move, bare, number))))
    return step
