"""A call's launches, recorded once and repeated: what the host does for a short call that it has seen before.

Between two calls with the same shapes, only addresses change, and numbers that a call names. So the second call of a
kind is recorded: which memory it takes, and each launch with its arguments, of which those that are addresses are known
by where they come from. From then on the host takes as much memory and repeats the launches: nothing is copied, no
memory is held, and they go to the current stream (into a graph too, while one captures). Where addresses come again,
the host launches a graph of them instead (kernels/runtime/graphs.py).

A launch may be given a part of a tensor (the heads of a lane), which is known by how far into the tensor it begins.

A call is repeated only if launches, and steps of the host that are noted too (kernels/runtime/recording.py), are all
that it does: any other operation seen while it is recorded (a copy, a sum) refuses it, and it runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from leetdist.kernels.runtime import recording, triton_launch
from leetdist.kernels.runtime.graphs import Graphs, in_graphs
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.repeated_launch import (
    CudaStep,
    LibraryStep,
    Sources,
    TritonStep,
    Unclear,
    cuda_step,
    extent,
    library_step,
    triton_step,
)

EMPTY = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)
# Says when memory may be taken by others: what a repeated call takes is used on the stream that it was taken on, or by
# streams that this one waits for, or it is refused.
UNSEEN = frozenset((torch.ops.aten.record_stream,))
ALIGNED = 512  # bytes: PyTorch's allocator on a GPU


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

    def __call__(self, taken: list[Tensor | None]) -> None:
        self.step(*[self._tensor(x, taken) for x in self.given])

    @staticmethod
    def _tensor(x: int | Part | Tensor, taken: list[Tensor | None]) -> Tensor:
        if isinstance(x, Tensor):
            return x
        found = taken[x if isinstance(x, int) else x.place]
        assert found is not None
        return found if isinstance(x, int) else found.as_strided(x.shape, x.strides, x.first)

    def places(self) -> set[int]:
        return {x if isinstance(x, int) else x.place for x in self.given if not isinstance(x, Tensor)}


Action: TypeAlias = TritonStep | CudaStep | LibraryStep | Message | recording.HostStep


@dataclass(eq=False)
class Workspace:
    """Memory that nobody but launches sees, taken at once: bytes in all, and of each tensor the place among those of
    the call and where it begins."""

    size: int
    begins: list[tuple[int, int]]


@dataclass(eq=False)
class Replay:
    """The memory that a call takes, what it does, in order, and which of the tensors it returns. `held`: tensors whose
    addresses are among the fixed arguments.

    Memory is taken on the current stream, before a step of the host may change that. A stream beside it may use it too:
    it begins after, and this one waits for its end. The launches that a call begins with go out as soon as there is
    what they need, and the GPU works while the host takes the rest.
    """

    device: torch.device
    memory: list[Memory | None]  # None: in the workspace
    workspace: Workspace
    actions: list[Action]
    returned: list[int | None]
    held: list[Tensor]
    numbers: int
    inputs: int

    def __post_init__(self) -> None:
        parts: list[Action | Graphs] = in_graphs(self.device, self.actions, self.numbers)
        first = list(takewhile(lambda part: isinstance(part, CudaStep | TritonStep), parts))
        used = {told[1] for step in first for told in (*step.addresses, *step.maps)}  # type: ignore[union-attr]
        own = [place for place, x in enumerate(self.memory) if x is not None]
        needed = [place for place in own if place + self.numbers + self.inputs in used]
        self.stages = [(needed, first), ([place for place in own if place not in needed], parts[len(first) :])]

    def __call__(self, inputs: list[Tensor], numbers: tuple[int, ...] = ()) -> tuple[Tensor | None, ...]:
        take, first = _taking(self.device), len(numbers) + len(inputs)
        taken: list[Tensor | None] = [None] * len(self.memory)
        sources = [*numbers, *[x.data_ptr() for x in inputs], *[0] * len(taken)]
        if self.workspace.size:
            space = take((self.workspace.size,), (1,), torch.uint8)
            begin = space.data_ptr()
            for place, offset in self.workspace.begins:
                sources[first + place] = begin + offset
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        for places, parts in self.stages:
            for place in places:
                wanted: Any = self.memory[place]
                taken[place] = x = take(wanted.shape, wanted.strides, wanted.dtype)
                sources[first + place] = x.data_ptr()
            addresses = tuple(sources)
            for part in parts:
                if not isinstance(part, Graphs):
                    stream = self._act(part, addresses, taken, stream)
                elif not part.launch(addresses, stream):
                    for step in part.steps:
                        stream = self._act(step, addresses, taken, stream)
        return tuple([None if place is None else taken[place] for place in self.returned])

    def _act(self, action: Action, addresses: tuple[int, ...], taken: list[Tensor | None], stream: int) -> int:
        """Launch, or take a step of the host. Returns the stream that is the current one after it."""
        if isinstance(action, recording.HostStep):
            action.step()
            if isinstance(action, recording.OnStream):
                return torch._C._cuda_getCurrentRawStream(self.device.index)
        elif isinstance(action, Message):
            action(taken)
        else:
            action(stream, addresses)
        return stream


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
    for event in recorder.events:
        if isinstance(event, Tensor):
            continue
        action: Action
        if isinstance(event, recording.HostStep):
            action = event
        elif isinstance(event, recording.TensorStep):
            action = Message(event.step, [given(x) for x in event.tensors])
        elif isinstance(event, recording.LibraryCall):
            action = library_step(event, sources)
        elif isinstance(event, recording.CudaLaunch):
            action = cuda_step(event, sources)
        else:
            action = triton_step(event, sources, held)
        actions.append(action)
    messages = [action for action in actions if isinstance(action, Message)]
    seen = {place for place in returned if place is not None}.union(*[message.places() for message in messages])
    own: list[Memory | None] = [x if place in seen else None for place, x in enumerate(memory)]
    unseen = {place: x for place, x in enumerate(taken) if place not in seen}
    return Replay(inputs[0].device, own, _workspace(unseen), actions, returned, held, numbers, len(inputs))


def _workspace(tensors: dict[int, Tensor]) -> Workspace:
    """For these, by place, each as aligned as if it were taken by itself."""
    size, begins = 0, []
    for place, x in tensors.items():
        begins.append((place, size))
        size += -(-extent(x) // ALIGNED) * ALIGNED
    return Workspace(size, begins)


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
    leetdist.kernels.runtime.triton_launch or cuda_launch, take steps of the host that recording notes, and return
    tensors that it has taken. It may look at the tensors' shapes, strides, dtypes and alignment only.

    where: what else decides on the launches, such as the place of a message, or the stream for steps of the host.
    numbers: what launches in CUDA C++ pass on as it is, and nothing else depends on.
    known: the caller's own memory of replays, and what this call is there: a shorter name for all of the above.
    """
    inputs = [x for x in tensors if x is not None]
    if not triton_launch.direct(inputs[0].device):
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


def forget(transport: Any) -> None:
    """Let go of calls over a group that has ended: they hold it by their plans, and its inboxes."""
    for known in (_once, _kinds):
        for kind in list(known):
            if any(getattr(x, "transport", None) is transport for x in kind):
                known.pop(kind, None)
