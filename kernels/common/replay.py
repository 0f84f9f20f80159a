"""A call's launches, recorded once and repeated: what the host does for a short call that it has seen before.

Between two calls with the same shapes, only addresses change, and numbers that a call names. So the second call of a
kind is recorded: which memory it takes, and each launch with its arguments, of which those that are addresses are known
by where they come from. From then on the host takes as much memory and repeats the launches. Unlike a CUDA graph,
nothing is copied, no memory is held, and the launches go to the current stream (into a graph too, while one captures).

A launch may be given a part of a tensor (the heads of a lane), which is known by how far into the tensor it begins.

A call is repeated only if launches, and steps of the host that are noted too (kernels/common/recording.py), are all
that it does: any other operation seen while it is recorded (a copy, a sum) refuses it, and it runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from leetdist.kernels.common import launch, launcher, recording
from leetdist.kernels.common.loader import Arguments, Kernel
from leetdist.kernels.common.memo import Memo
from leetdist.kernels.common.tensor_map import TensorMap, tensor_map

EMPTY = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)
# Says when memory may be taken by others: what a repeated call takes is used on the stream that it was taken on, or by
# streams that this one waits for, or it is refused.
UNSEEN = frozenset((torch.ops.aten.record_stream,))


class Recorder(TorchDispatchMode):
    """Sees memory being taken, and whatever else a call does."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []  # tensors, and what recording notes
        self.refused: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not recording.noting():  # a step of the host
            return out
        if func.overloadpacket in EMPTY:
            if out.numel():
                self.events.append(out)
        elif not func.is_view and func.overloadpacket not in UNSEEN:
            self.refused = str(func)
        return out

    def __enter__(self) -> Recorder:
        recording.record_into(self.events)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        recording.record_into(None)
        super().__exit__(*error)


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

    def __call__(self, stream: int, sources: list[int]) -> None:
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
    handed: launcher.Handed
    addresses: list[tuple[int, int, int]]
    maps: list[tuple[int, int, int, Map]]

    def __call__(self, stream: int, sources: list[int]) -> None:
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


@dataclass
class Memory:
    """A tensor to take."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """Of the tensor taken at a place: its shape, strides, and the number that it begins with."""

    place: int
    shape: torch.Size
    strides: tuple[int, ...]
    first: int


@dataclass(eq=False)
class Message:
    """A step of the host with tensors: which of those taken, parts of them, or others that do not move."""

    step: Callable[..., Any]
    given: list[int | Part | Tensor]

    def __call__(self, taken: list[Tensor]) -> None:
        tensors = []
        for x in self.given:
            if isinstance(x, int):
                x = taken[x]
            elif isinstance(x, Part):
                x = taken[x.place].as_strided(x.shape, x.strides, x.first)
            tensors.append(x)
        self.step(*tensors)


Action: TypeAlias = Memory | TritonStep | CudaStep | Message | recording.HostStep


@dataclass(eq=False)
class Replay:
    """What a call does, in order, and which of the tensors that it takes are returned. `held`: tensors whose addresses
    are among the fixed arguments."""

    device: torch.device
    actions: list[Action]
    returned: list[int | None]
    held: list[Tensor]

    def __call__(self, inputs: list[Tensor], numbers: tuple[int, ...] = ()) -> tuple[Tensor | None, ...]:
        device, taken, take = self.device, [], _taking(self.device)
        sources = [*numbers, *[x.data_ptr() for x in inputs]]
        for action in self.actions:
            if isinstance(action, Memory):
                x = take(action.shape, action.strides, action.dtype)
                taken.append(x)
                sources.append(x.data_ptr())
            elif isinstance(action, recording.HostStep):
                action.step()
            elif isinstance(action, Message):
                action(taken)
            else:
                action(torch._C._cuda_getCurrentRawStream(device.index), sources)
        return tuple([None if place is None else taken[place] for place in self.returned])


def _taking(device: torch.device) -> Callable[..., Tensor]:
    """`torch.empty_strided` on the device, which is the current one. Compiled graphs take memory by a function that
    does not go through the dispatcher, which is a microsecond a tensor; it fills none with NaN where all shall be."""
    if device.type == "cuda" and _empty_on_cuda is not None and not torch.are_deterministic_algorithms_enabled():
        return _empty_on_cuda
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


_empty_on_cuda: Callable[..., Tensor] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


def record(
    function: Callable[..., tuple[Tensor | None, ...]],
    inputs: list[Tensor],
    arguments: tuple[Any, ...],
    numbers: tuple[int, ...] = (),
) -> tuple[tuple[Tensor | None, ...], Replay | None]:
    """function(*arguments, *numbers), and how to repeat it for other `inputs` (its arguments that are tensors) and
    numbers; None if it cannot be."""
    marked = [recording.Number(x) for x in numbers]
    for source, number in enumerate(marked):
        number.source = source
    with Recorder() as recorder:
        outputs = function(*arguments, *marked)
    try:
        return outputs, _replay(recorder, outputs, inputs, len(numbers))
    except Unclear:
        return outputs, None


def _replay(recorder: Recorder, outputs: tuple[Tensor | None, ...], inputs: list[Tensor], numbers: int) -> Replay:
    """Of what was recorded; `numbers` come before the inputs."""
    taken = [event for event in recorder.events if isinstance(event, Tensor)]
    sources = Sources([*inputs, *taken], first=numbers)
    if recorder.refused or len(sources.places) < len(inputs) + len(taken):  # or two share an address
        raise Unclear
    memory = [Memory(tuple(x.shape), x.stride(), x.dtype) for x in taken]

    def number_of(x: Tensor) -> int:
        place = sources.places.get(x.data_ptr(), 0) - len(inputs) - numbers
        if place < 0:
            raise Unclear
        return place

    def given(x: Tensor) -> int | Part | Tensor:
        found = sources.of(x.data_ptr())
        if found is None:
            return x
        place = found[0] - len(inputs) - numbers
        if place < 0 or x.dtype != taken[place].dtype:
            raise Unclear
        if Memory(tuple(x.shape), x.stride(), x.dtype) == memory[place]:
            return place
        return Part(place, x.shape, x.stride(), found[1] // x.itemsize)

    returned: list[int | None] = []
    for x in outputs:
        place = None
        if x is not None:
            place = number_of(x)
            if x.numel() != taken[place].numel() or place in returned:
                raise Unclear
            memory[place] = Memory(tuple(x.shape), x.stride(), x.dtype)
        returned.append(place)
    actions: list[Action] = []
    held: list[Tensor] = []
    to_take = iter(memory)
    for event in recorder.events:
        action: Action
        if isinstance(event, Tensor):
            action = next(to_take)
        elif isinstance(event, recording.HostStep):
            action = event
        elif isinstance(event, recording.TensorStep):
            action = Message(event.step, [given(x) for x in event.tensors])
        elif isinstance(event, recording.CudaLaunch):
            action = _cuda_step(event, sources)
        else:
            action = _triton_step(event, sources, held)
        actions.append(action)
    return Replay(inputs[0].device, actions, returned, held)


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
                if x is None or not 0 <= address - x.data_ptr() < _extent(x):
                    raise Unclear
                return self.places[x.data_ptr()], address - x.data_ptr()
        return None


def _extent(x: Tensor) -> int:
    """Bytes from the first number of x to the end of the last."""
    return x.itemsize * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def _cuda_step(launched: recording.CudaLaunch, sources: Sources) -> CudaStep:
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


def _words(address: int, kind: Any) -> memoryview:
    """A tensor's map, as words of 64 bits."""
    made = tensor_map(address, kind)
    assert made is not None  # the first had one, and addresses are a multiple of 16 for both or for neither
    return memoryview(made).cast("q")


def _triton_step(launched: recording.TritonLaunch, sources: Sources, held: list[Tensor]) -> TritonStep:
    if launched.compiled is None or any(isinstance(x, recording.Number) for x in launched.arguments):
        raise Unclear  # only Triton knows; and it may have compiled for the number's value
    handed = launcher.handed(launched.compiled, launched.grid, launched.arguments)
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
            step.maps.append((place, *found, Map(partial(handed.move, x, number))))
    return step


# Kinds of calls seen: once, wherever it was, and then with how to repeat them, or None for those that cannot be.
# (A model has as many as layers, passes and places of messages.)
_once: Memo[tuple[Any, ...], None] = Memo(4096)
_kinds: Memo[tuple[Any, ...], Replay | None] = Memo(4096)


def repeated(
    function: Callable[..., tuple[Tensor | None, ...]],
    tensors: tuple[Tensor | None, ...],
    *more: Any,
    where: Hashable = None,
    numbers: tuple[int, ...] = (),
    known: tuple[dict[Hashable, Replay], Hashable] | None = None,
) -> tuple[Tensor | None, ...]:
    """function(*tensors, *more, *numbers), which must do nothing but take memory, launch through
    leetdist.kernels.common.launch, take steps of the host that it notes, and return tensors that it has taken. It may
    look at the tensors' shapes, strides, dtypes and alignment only.

    where: what else decides on the launches, such as the place of a message, or the stream for steps of the host.
    numbers: what launches in CUDA C++ pass on as it is, and nothing else depends on.
    known: the caller's own memory of replays, and what this call is there: a shorter name for all of the above.
    """
    inputs = [x for x in tensors if x is not None]
    if not launch.direct(inputs[0].device):
        return function(*tensors, *more, *numbers)
    if known is not None and known[1] in known[0]:
        return known[0][known[1]](inputs, numbers)
    kind = (
        function, where, *more,
        *[None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors],
    )  # fmt: skip
    replay = _kinds.get(kind)
    if replay is not None:
        if known is not None:
            known[0][known[1]] = replay
        return replay(inputs, numbers)
    anywhere = (function, None, *kind[2:])
    if anywhere in _once and kind not in _kinds:
        outputs, _kinds[kind] = record(function, inputs, (*tensors, *more), numbers)
        return outputs
    _once[anywhere] = None
    return function(*tensors, *more, *numbers)
