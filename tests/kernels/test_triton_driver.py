"""Launches without asking Triton, and repeated ones, hand to the driver what Triton itself does: on a machine without a
GPU, with another driver under Triton's own launcher, whichever release it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.runtime import recording

triton = pytest.importorskip("triton")
triton_launch = pytest.importorskip("leetdist.kernels.runtime.triton_launch")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402

from leetdist.kernels.constant_decay.triton import fold  # noqa: E402
from leetdist.kernels.runtime import replay, triton_driver  # noqa: E402
from leetdist.kernels.runtime.triton_release import why_not_gluon  # noqa: E402

pytestmark = pytest.mark.real_empty
STREAM = 7
gluon = pytest.importorskip("leetdist.kernels.constant_decay.triton.hopper") if why_not_gluon() is None else None
KERNELS = [fold._fold] if gluon is None else [fold._fold, gluon.tile_states_kernel]
DECAY = torch.tensor([-0.1, -0.5])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[tuple[Any, ...]]]:
    """What the function in C is given, launch after launch."""
    found: list[tuple[Any, ...]] = []

    def in_c(*arguments: Any) -> None:
        found.append(arguments)

    def tensor_map(*described: Any) -> tuple[Any, ...]:
        return ("map", *(tuple(x) if isinstance(x, list | torch.Size) else x for x in described))

    utils = SimpleNamespace(
        launch=in_c, build_signature_metadata=lambda kinds: ("kinds", *kinds), unload_module=lambda module: None,
        fill_tma_descriptor=tensor_map, fill_tma_descriptor_tiled=tensor_map,
        load_binary=lambda *described: (None, 11, 0, 0, 1024),  # no module, or it would be unloaded
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )  # fmt: skip
    active = SimpleNamespace(
        utils=utils, launcher_cls=nvidia.CudaLauncher, get_current_device=lambda: 0,
        get_current_stream=lambda device: STREAM, get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )  # fmt: skip
    # Until 3.6 each kernel's function is compiled, from then on there is one, which is told of what kinds they are.
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **source: utils, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", lambda: [])
    monkeypatch.setattr(nvidia, "PyKernelArg", lambda **kind: tuple(kind.items()), raising=False)
    for name in ("ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
        monkeypatch.setattr(nvidia, name, name, raising=False)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(triton_launch, "direct", lambda device: True)
    for module, name in ((triton_launch, "_kept"), (replay, "_kinds")):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(replay, "_once", {})
    monkeypatch.setattr(triton_driver, "_unrecognised", [])
    for kernel in KERNELS:  # what is compiled here is nobody else's
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(active)
    yield found
    triton.runtime.driver._active = before


def plain(states: Tensor, tiles: Tiles) -> Tensor:
    """A kernel of Triton's: pointers, one of them none, numbers of both kinds."""
    final = fold.fold(states, None, DECAY, tiles, reverse=False)
    assert final is not None
    return final


def hopper(b: Tensor, tiles: Tiles) -> Tensor:
    """A kernel of Gluon's, with descriptors."""
    assert gluon is not None
    return gluon.tile_states(b, b, DECAY, tiles, reverse=False, scale=0.5)


CASES = [
    pytest.param(plain, lambda: torch.randn(1, 2, 3, 16, 16), id="plain"),
    pytest.param(
        hopper, lambda: torch.randn(1, 2, 300, 64).bfloat16(), id="gluon",
        marks=pytest.mark.skipif(why_not_gluon() is not None, reason=str(why_not_gluon())),
    ),
]  # fmt: skip


def said(call: tuple[Any, ...]) -> list[Any]:
    """Without the hooks, which nobody has set, and what they would be told; with tensors as their addresses."""
    return [_said(x) for x in call]


def _said(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return said(x)  # type: ignore[arg-type]
    if isinstance(x, Tensor):
        return x.data_ptr()
    return None if type(x).__name__ in ("HookChain", "LazyDict") else x


@pytest.mark.parametrize(("function", "draw"), CASES)
def test_direct_and_repeated_launches_are_those_of_triton(
    calls: list[tuple[Any, ...]], function: Callable[..., Tensor], draw: Callable[[], Tensor], monkeypatch: Any
) -> None:
    assert triton_driver.why_not_repeated() is None
    tiles = Tiles(128, (0, 300))

    def forward(x: Tensor) -> tuple[Tensor]:
        return (function(x, tiles),)

    kept = []
    for _ in range(4):  # Triton's own, recorded (and launched without asking), repeated twice
        x = draw()
        kept.append((x, *replay.repeated(forward, (x,))))
    assert len(calls) == 4
    assert list(replay._kinds.values()) != [None]
    assert len({str(said(call)) for call in calls}) == 4  # their addresses differ
    monkeypatch.setattr(triton_launch, "DIRECT", False)
    for call, (x, out) in zip(list(calls), kept, strict=True):
        monkeypatch.setattr(torch, "empty", lambda *shape, out=out, **options: out)
        forward(x)  # as Triton launches it for these tensors
        assert said(calls[-1]) == said(call)


def test_fused_operations_are_asked_for_by_name(calls: list[tuple[Any, ...]], monkeypatch: Any) -> None:
    """Triton's default is the environment's, and 3.10 changes it."""
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    noted: list[Any] = []
    recording.record_into(noted)
    plain(torch.randn(1, 2, 3, 16, 16), Tiles(128, (0, 300)))
    recording.record_into(None)
    (only,) = [x for x in noted if isinstance(x, recording.TritonLaunch)]
    assert only.compiled.metadata.enable_fp_fusion is True


def test_a_launcher_that_is_not_known_is_not_repeated(calls: list[tuple[Any, ...]], monkeypatch: Any) -> None:
    """What a later Triton may do: its launches are Triton's own, and the reason is there to be read."""
    usual = nvidia.CudaLauncher.__call__

    def later(self: Any, *arguments: Any) -> None:
        usual(self, *arguments, 5)

    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", later)
    tiles = Tiles(128, (0, 300))

    def forward(x: Tensor) -> tuple[Tensor]:
        return (plain(x, tiles),)

    for count in range(4):
        replay.repeated(forward, (torch.randn(1, 2, 3, 16, 16),))
        assert len(calls) == count + 1
    assert list(replay._kinds.values()) == [None]
    assert "_fold" in str(triton_driver.why_not_repeated())
    triton_driver._another_launcher.cache_clear()
    try:
        monkeypatch.setattr(triton_driver, "_unrecognised", [])
        assert "other arguments" in str(triton_driver.why_not_repeated())
    finally:
        monkeypatch.undo()
        triton_driver._another_launcher.cache_clear()


def test_constants_of_kernels_equal_themselves() -> None:
    """Triton compares them before every launch, and refuses one beside a NaN, which is never what it was."""
    import importlib
    from pathlib import Path

    import leetdist.kernels.constant_decay.triton as home

    folders = [Path(home.__path__[0]), Path(home.__path__[0]).parents[1] / "token_decay" / "triton"]
    found = 0
    for path in (path for folder in folders for path in folder.glob("*.py")):
        if gluon is None and "hopper" in path.name:
            continue
        module = importlib.import_module(f"leetdist.kernels.{path.parents[1].name}.triton.{path.stem}")
        constants = {n: x.value for n, x in vars(module).items() if isinstance(x, triton.language.constexpr)}
        assert all(x == x for x in constants.values()), (path.name, constants)
        found += len(constants)
    assert found
