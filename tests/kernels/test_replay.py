"""Calls whose launches are recorded and repeated: what a repeated call passes on, and which calls are not repeated."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import Array, c_float, c_int64, c_void_p
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import leetdist
from leetdist.kernels.runtime import cuda_launch, recording
from leetdist.reference import relative_error

replay = pytest.importorskip("leetdist.kernels.runtime.replay")
triton_launch = replay.triton_launch
repeated_launch = pytest.importorskip("leetdist.kernels.runtime.repeated_launch")

TABLE = torch.arange(4)


class Kernel:
    """Stands for a compiled kernel: keeps what it is launched with. (How Triton does it is test_triton_driver's.)"""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def handed(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Any:
        return SimpleNamespace(
            function=self.launch, before=grid, after=(11, False), together=False,
            arguments=list(arguments), places=range(len(arguments)),
        )  # fmt: skip

    def launch(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch, "direct", lambda device: True)
    monkeypatch.setattr(repeated_launch.triton_driver, "handed", Kernel.handed)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(replay, "_once", {})
    monkeypatch.setattr(replay, "_kinds", {})
    return Kernel()


def launched(kernel: Kernel, *arguments: Any) -> None:
    recording.note(recording.TritonLaunch(kernel, (5, 1, 1), arguments))


def outputs(a: Tensor, b: Tensor | None, kernel: Kernel, extra: str) -> tuple[Tensor | None, ...]:
    between = torch.empty(a.shape[0], 3)
    out = torch.empty(3, a.shape[0]).transpose(0, 1)
    if extra == "sum":
        between += 1
    if extra == "copy":
        a = a.T.contiguous()
    launched(kernel, a, 2, between[1:] if extra == "part" else between, TABLE)
    launched(kernel, between, b, out, 0.5)
    return out, None, between.flatten()


def test_a_thread_is_bound_before_its_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it launches: passes in CUDA C++ alone were never repeated on a thread of autograd's."""
    bound: list[torch.device] = []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: bound.append(device))
    here, there = torch.device("cuda", 1), torch.device("cuda", 0)
    with ThreadPoolExecutor(1) as thread:
        direct = [thread.submit(triton_launch.direct, device).result() for device in (there, here, here)]
    assert direct == [False, True, True]
    assert bound == [here]


@pytest.mark.real_empty
def test_repeats_launches_with_new_addresses(kernel: Kernel) -> None:
    for _ in range(2):
        replay.repeated(outputs, (torch.randn(4, 4), None), kernel, "")
    assert len(replay._kinds) == 1
    assert not kernel.calls  # they were recorded, not launched
    a = torch.randn(4, 4)
    out, none, between = replay.repeated(outputs, (a, None), kernel, "")
    assert none is None
    assert (out.shape, out.stride()) == ((4, 3), (1, 4))
    assert between.shape == (12,)
    head = (5, 1, 1, 7, 11, False)
    assert kernel.calls == [
        (*head, a.data_ptr(), 2, between.data_ptr(), TABLE.data_ptr()),
        (*head, between.data_ptr(), None, out.data_ptr(), 0.5),
    ]


@pytest.mark.real_empty
def test_no_tensor_of_the_recorded_call_is_kept(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither itself nor in a descriptor, whose map is made anew for where another lies."""

    def handed(kernel: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Any:
        made = kernel.handed(grid, arguments)
        made.move = lambda descriptor, number, address: (descriptor.name, number, address)
        return made

    monkeypatch.setattr(repeated_launch.triton_driver, "handed", handed)
    memory = []

    def outputs(a: Tensor, b: Tensor, kernel: Kernel) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        memory.extend(StorageWeakRef(x.untyped_storage()) for x in (a, b, out))
        launched(kernel, SimpleNamespace(base=a, name="a"), b, SimpleNamespace(base=out, name="out"))
        return (out,)

    for _ in range(2):
        replay.repeated(outputs, (torch.randn(4), torch.randn(4)), kernel)
    assert None not in replay._kinds.values()
    assert all(x.expired() for x in memory)
    a, b = torch.randn(4), torch.randn(4)
    (out,) = replay.repeated(outputs, (a, b), kernel)
    assert kernel.calls[0][-3:] == (("a", 0, a.data_ptr()), b.data_ptr(), ("out", 2, out.data_ptr()))


@pytest.mark.real_empty
def test_calls_of_a_library_are_repeated(kernel: Kernel) -> None:
    """With the stream, and where the tensors of a call are now; not where one of them is none of the call's."""
    calls: list[tuple[int, ...]] = []

    def passed(*given: int) -> None:
        calls.append(given)

    def outputs(a: Tensor, elsewhere: Tensor | None) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        recording.call_library(passed, a, out[2:])
        if elsewhere is not None:
            recording.call_library(passed, TABLE)
        return (out,)

    for fixed in (None, TABLE.float()):
        for _ in range(2):
            replay.repeated(outputs, (torch.randn(4), fixed))
    assert [found is None for found in replay._kinds.values()] == [False, True]
    assert len(calls) == 2 * (1 + 2)
    a = torch.randn(4)
    (out,) = replay.repeated(outputs, (a, None))
    assert calls[-1] == (7, a.data_ptr(), out.data_ptr() + 2 * 4)


@pytest.mark.real_empty
def test_what_triton_alone_can_launch_is_not_repeated(kernel: Kernel) -> None:
    def outputs(a: Tensor) -> tuple[Tensor, ...]:
        recording.note(recording.TritonLaunch(None, (5, 1, 1), (a,)))
        return (torch.empty(3),)

    for _ in range(3):
        replay.repeated(outputs, (torch.randn(4),))
    assert list(replay._kinds.values()) == [None]


@pytest.mark.real_empty
def test_parts_of_tensors_are_repeated(kernel: Kernel) -> None:
    """By how far into its tensor each begins; not of inputs that lie in one memory, which others may not do."""
    for _ in range(3):
        a, b = torch.randn(4, 4), torch.randn(4, 4)
        _, _, between = replay.repeated(outputs, (a, b[2:]), kernel, "part")
    assert between is not None
    head = (5, 1, 1, 7, 11, False)
    assert kernel.calls[0] == (*head, a.data_ptr(), 2, between.data_ptr() + 3 * 4, TABLE.data_ptr())
    assert kernel.calls[1][-3] == b.data_ptr() + 2 * 4 * 4

    def parts(a: Tensor, b: Tensor, kernel: Kernel) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        launched(kernel, a[1:], b[1:], out)
        return (out,)

    for together in (True, False):
        kernel.calls.clear()
        for _ in range(3):
            a, b = torch.randn(2, 4, 4) if together else (torch.randn(4, 4), torch.randn(4, 4))
            (out,) = replay.repeated(parts, (a, b), kernel, where=together)
        assert len(kernel.calls) == (0 if together else 2)
    assert out is not None
    assert kernel.calls[-1] == (*head, a.data_ptr() + 16, b.data_ptr() + 16, out.data_ptr())

    def beside(a: Tensor, kernel: Kernel) -> tuple[Tensor, ...]:
        launched(kernel, a, a.as_strided((4,), (1,), 16), out := torch.empty(8))
        return (out,)

    for _ in range(3):  # in the memory of a, and no part of it
        replay.repeated(beside, (torch.randn(2, 4, 4)[0],), kernel)
    assert list(replay._kinds.values())[-1] is None


@pytest.mark.real_empty
@pytest.mark.parametrize("extra", ["sum", "copy"])
def test_what_is_more_than_launches_is_not_repeated(kernel: Kernel, extra: str) -> None:
    for _ in range(3):
        replay.repeated(outputs, (torch.randn(4, 4), None), kernel, extra)
    assert list(replay._kinds.values()) == [None]
    assert not kernel.calls


class Driver:
    """Stands for the one that launches kernels in CUDA C++: keeps what it is told, and the arguments that it would copy
    (an address, a map, a number, a float, an address)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *told: Any) -> tuple[int]:
        *head, places, _ = told
        kinds = (c_int64, c_int64 * 16, c_int64, c_float, c_int64)
        found = [kind.from_address(at) for kind, at in zip(kinds, (c_void_p * 5).from_address(places), strict=True)]
        self.calls.append((*head, *[list(x) if isinstance(x, Array) else x.value for x in found]))
        return (0,)


def told(a: Tensor, out: Tensor) -> tuple[Any, ...]:
    return (3, 6, 1, 1, 128, 1, 1, 64, 7, a.data_ptr(), [out.data_ptr()] * 16, -5, 0.5, TABLE.data_ptr())


@pytest.fixture
def in_cuda(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Driver]:
    """A call with a launch in CUDA C++, and what it tells the driver. A map is its tensor's address, 16 times."""
    driver = Driver()
    launched = cuda_launch.Kernel(torch.device("cuda", 0), 3, 64, None, driver)
    made = lambda address, kind: address.to_bytes(8, sys.byteorder) * 16  # noqa: E731
    monkeypatch.setattr(repeated_launch, "tensor_map", made)

    def outputs(a: Tensor, part: int) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        first = repeated_launch.TensorMap(bytes(128))
        first.address, first.kind = out.data_ptr(), ("kind",)
        arguments = (a.data_ptr(), first, -5, 0.5, out.data_ptr() + 4 if part else TABLE.data_ptr())
        recording.note(recording.CudaLaunch(launched, (6,), 128, arguments))
        return (out,)

    return outputs, driver


@pytest.mark.real_empty
def test_kernels_in_cuda_are_repeated_too(in_cuda: tuple[Any, Driver]) -> None:
    """Their addresses are integers, and maps are made anew for where a tensor is."""
    outputs, driver = in_cuda
    kept = []
    for call in range(5):
        a = torch.randn(4)
        (out,) = replay.repeated(outputs, (a,), 0)
        kept.append((a, out))
        assert driver.calls == [told(*pair) for pair in kept[2:]], call
    for _ in range(3):
        (out,) = replay.repeated(outputs, (a,), 1)
    assert driver.calls[3:] == [(*told(a, out)[:-1], out.data_ptr() + 4)]


@pytest.mark.real_empty
def test_threads_repeat_with_arguments_of_their_own(in_cuda: tuple[Any, Driver]) -> None:
    """What one thread is about to launch is not another's to write over."""
    outputs, driver = in_cuda
    for _ in range(2):
        replay.repeated(outputs, (torch.randn(4),), 0)
    (step,) = (action for action in next(iter(replay._kinds.values())).actions if isinstance(action, replay.CudaStep))
    places = [step.arguments.places]
    a = torch.randn(4)

    def repeat() -> tuple[Tensor, ...]:
        places.append(step.arguments.places)
        return replay.repeated(outputs, (a,), 0)

    with ThreadPoolExecutor(1) as pool:
        (out,) = pool.submit(repeat).result()
    assert driver.calls == [told(a, out)]
    assert places[0] != places[1]


@pytest.mark.real_empty
def test_steps_of_the_host_are_taken_again_in_order(kernel: Kernel) -> None:
    taken: list[str] = []

    def outputs(a: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        recording.take(lambda: taken.append(f"before {len(kernel.calls)}"))
        launched(kernel, a, out)
        recording.take(lambda: taken.append(f"after {len(kernel.calls)}"))
        return (out,)

    for place in (0, 0, 1, 0, 1):
        replay.repeated(outputs, (torch.randn(4),), where=place)
    assert len(kernel.calls) == 2  # the others were the first of all, and one for each place that was recorded
    assert taken == ["before 0", "after 0"] * 3 + ["before 0", "after 1", "before 1", "after 2"]


@pytest.mark.real_empty
def test_kinds(kernel: Kernel) -> None:
    """Shapes, strides, dtypes and what else is passed tell calls apart; the same tensor twice is not repeated."""
    for a in (torch.randn(4, 4), torch.randn(4, 4).T, torch.randn(4, 4).half(), torch.randn(5, 5)):
        for _ in range(2):
            replay.repeated(outputs, (a, None), kernel, "")
    assert len(replay._kinds) == 4
    assert None not in replay._kinds.values()
    same = torch.randn(4, 4)
    for _ in range(2):
        replay.repeated(outputs, (same, same), kernel, "")
    assert list(replay._kinds.values())[-1] is None


@pytest.mark.gpu
@pytest.mark.real_empty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_repeated_calls_on_a_gpu(dtype: torch.dtype, documents: bool) -> None:
    """New inputs each time: equal to the first kind of call, bit for bit, forward and backward."""
    decay = torch.tensor([-0.01, -0.5], device="cuda")
    options: dict[str, Any] = {"method": "block"}
    if documents:
        options["cu_seqlens"] = torch.tensor([0, 300, 301, 1500], device="cuda")

    def both(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        o = leetdist.linear_attention(*leaves, decay, scale=0.1, **options)
        return [o, *torch.autograd.grad(o, leaves, tensors[3])]

    inputs = [
        [torch.randn(1, 1500, 2, 128, device="cuda").to(dtype).transpose(1, 2) for _ in range(4)] for _ in range(4)
    ]
    replay._kinds.clear()
    replay._once.clear()
    first = [both(tensors) for tensors in inputs]  # seen, recorded, repeated twice
    assert len(replay._kinds) == 2
    assert None not in replay._kinds.values()
    replay._kinds.clear()
    replay._once.clear()
    again = both(inputs[3])  # as ever
    assert all(torch.equal(x, y) for x, y in zip(first[3], again, strict=True))
    expected = leetdist.linear_attention(*(x.double() for x in inputs[3][:3]), decay.double(), scale=0.1,
                                         cu_seqlens=options.get("cu_seqlens"))  # fmt: skip
    assert relative_error(first[3][0], expected) < 4e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = leetdist.linear_attention(*inputs[0][:3], decay, scale=0.1, **options)
    graph.replay()
    assert torch.equal(captured, first[0][0])
