"""token_scan.cu on a machine without a GPU: what it computes, and that it compiles cleanly."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptxas
import pytest
import torch
from emulated import compiler

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import token_scan
from leetdist.kernels.constant_decay.pytorch import block
from leetdist.kernels.runtime import nvrtc
from leetdist.reference import relative_error

HERE = Path(__file__).parent
NAME = "constant_decay/cuda/token_scan.cu"
SOURCE = nvrtc.SOURCES / NAME
# Dk, type of the inputs, type of the outputs. Compiling takes seconds: every Dk and type for one architecture, and
# what needs the most registers for the others.
VARIANTS = [
    *(
        ("sm_90", *variant)
        for variant in [(128, 0, 0, 4), (128, 1, 1, 4), (256, 0, 0, 1), (64, 1, 0, 4), (32, 2, 2, 1)]
    ),
    *((architecture, dk, 0, 0, 4) for architecture in ("sm_80", "sm_100") for dk in (128, 256)),
    *((architecture, 256, 1, 1, 1) for architecture in ("sm_80", "sm_100")),
]


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize("by_token", [0, 1])
@pytest.mark.parametrize(("architecture", "dk", "read", "written", "vector"), VARIANTS)
def test_compiles_without_warnings_or_spills(
    architecture: str, dk: int, read: int, written: int, vector: int, by_token: int
) -> None:
    defines = {"DK": dk, "IN": read, "OUT": written, "VECTOR": vector, "BY_TOKEN": by_token}
    text = ptxas.report(NAME, architecture, defines.items())
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert spilled == [("0", "0", "0")], text


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The kernels, compiled by the host's C++ compiler for tests/emulated_cuda.h; in leetdist's `kernel` interface."""
    folder = tmp_path_factory.mktemp("emulated")
    libraries: dict[tuple[int, ...], ctypes.CDLL] = {}

    def kernel(source: str, name: str, device: torch.device, defines: tuple[tuple[str, int], ...]) -> Any:
        assert source == NAME
        given = {name: value for name, value in defines if name in ("DK", "VECTOR", "BY_TOKEN")}
        key = tuple(given.values())
        if key not in libraries:
            library = folder / f"{key}.so"
            command = *compiler(), *(f"-D{k}={v}" for k, v in given.items()), str(HERE / "emulated_token_scan.cpp")
            subprocess.run([*command, "-o", str(library)], check=True)
            libraries[key] = ctypes.CDLL(str(library))
        function = getattr(libraries[key], f"run_{name}")

        def launch(grid: tuple[int, ...], block: int, *arguments: Any) -> None:
            typed = [ctypes.c_float(x) if isinstance(x, float) else ctypes.c_longlong(x or 0) for x in arguments]
            function(*typed, ctypes.c_longlong(grid[0]))

        return launch

    return kernel


@pytest.mark.parametrize(
    ("dk", "dv", "bounds", "tile"),
    [
        (64, 70, (0, 37), 16),
        (30, 16, (0, 21, 21, 40), 16),
        (128, 100, (0, 20), 16),
        (200, 33, (0, 19), 16),
        (16, 20, (0, 130), 128),
    ],
)
def test_computes_what_block_does(
    dk: int, dv: int, bounds: tuple[int, ...], tile: int, emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scan, "kernel", emulated)
    tiles, tokens = Tiles(tile, bounds), bounds[-1]
    a = torch.randn(1, tokens, 3, dk).transpose(1, 2)
    b, c = torch.randn(1, 1, tokens, dk), torch.randn(1, 3, tokens, dv)
    states = torch.randn(1, 3, tiles.count, dv, dk).mT
    log_decay = torch.tensor([-1e-3, -1.9, -30.0])  # groups of 16 tokens, of 8, of one
    exact = [x.double() for x in (a, b, c, states)]
    for reverse in (False, True):
        options = {"reverse": reverse, "scale": 0.7, "state_scale": 1.3}
        wanted = block.tile_outputs(*exact, log_decay, tiles, out_dtype=torch.float64, **options)
        for outputs in (token_scan.tile_outputs, token_scan.tile_outputs_by_token):
            ours = outputs(a, b, c, states, log_decay, tiles, out_dtype=torch.float32, **options)
            assert relative_error(ours, wanted) < 4e-7


def test_bits_do_not_depend_on_the_company(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile alone gives the bits that it gives beside other tiles, heads and batch entries."""
    monkeypatch.setattr(token_scan, "kernel", emulated)
    a, b, c = (torch.randn(2, 2, 48, 32) for _ in range(3))
    states = torch.randn(2, 2, 3, 32, 32)
    log_decay = torch.tensor([-0.1, -3.0])
    options = {"reverse": False, "scale": 0.7, "state_scale": 0.7, "out_dtype": torch.float32}
    whole = token_scan.tile_outputs(a, b, c, states, log_decay, Tiles(16, (0, 48)), **options)
    part = (slice(1, 2), slice(1, 2))
    alone = token_scan.tile_outputs(
        *(x[part][:, :, 16:32] for x in (a, b, c)),
        states[part][:, :, 1:2],
        log_decay[1:],
        Tiles(16, (0, 16)),
        **options,
    )
    assert torch.equal(alone, whole[part][:, :, 16:32])


def test_writes_where_it_is_told(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scan, "kernel", emulated)
    a, b, c = (torch.randn(1, 2, 20, 16) for _ in range(3))
    log_decay, tiles = torch.tensor([-0.1, -3.0]), Tiles(16, (0, 20))
    states = torch.randn(1, 2, 2, 16, 16)
    options = {"reverse": True, "scale": 0.7, "state_scale": 1.0, "out_dtype": torch.float32}
    wanted = token_scan.tile_outputs(a, b, c, states, log_decay, tiles, **options)
    wide = torch.empty(1, 20, 5, 16).transpose(1, 2)
    token_scan.tile_outputs(a, b, c, states, log_decay, tiles, **options, out=wide[:, 1:3])
    assert torch.equal(wide[:, 1:3], wanted)


def test_vectors_change_no_bit(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scan, "kernel", emulated)
    a, b, c = (torch.randn(1, 2, 20, 32) for _ in range(3))
    states, log_decay, tiles = torch.randn(1, 2, 2, 32, 32), torch.tensor([-0.1, -3.0]), Tiles(16, (0, 20))
    options = {"reverse": False, "scale": 0.7, "state_scale": 1.0, "out_dtype": torch.float32}
    wanted = token_scan.tile_outputs(a, b, c, states, log_decay, tiles, **options)
    shifted = torch.empty(a.numel() + 1)[1:].view_as(a).copy_(a)
    assert (token_scan._vector(a, b, c), token_scan._vector(shifted, b, c)) == (4, 1)
    assert torch.equal(token_scan.tile_outputs(shifted, b, c, states, log_decay, tiles, **options), wanted)


def test_refuses_a_state_that_does_not_fit() -> None:
    x = torch.randn(1, 1, 16, 300)
    with pytest.raises(ValueError, match="state of up to 256 rows, got 300"):
        token_scan.tile_outputs(
            x, x, x, torch.zeros(1, 1, 1, 300, 300), torch.zeros(1), Tiles(16, (0, 16)),
            reverse=False, scale=1.0, state_scale=1.0, out_dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.skipif(nvrtc.version() is None, reason="needs cuda-core and NVRTC")
def test_nvrtc_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.core

    monkeypatch.setenv("LEETDIST_CACHE", str(tmp_path / "cache"))
    defines = (("DK", 32), ("IN", 0), ("OUT", 0), ("VECTOR", 1), ("BY_TOKEN", 0))
    code = nvrtc.cubin(NAME, "sm_90", defines)
    assert code[:4] == b"\x7fELF"
    assert nvrtc.cubin(NAME, "sm_90", (("DK", 32), ("IN", 1), ("OUT", 1), ("VECTOR", 1), ("BY_TOKEN", 0))) != code
    assert len(list((tmp_path / "cache").iterdir())) == 2

    def never(*args: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(cuda.core, "Program", never)
    assert nvrtc.cubin(NAME, "sm_90", defines) == code
    with pytest.raises(AssertionError, match="compiled again"):
        nvrtc.cubin(NAME, "sm_80", defines)


@pytest.mark.skipif(nvrtc.version() is None, reason="needs cuda-core and NVRTC")
def test_the_benchmarks_kernel_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_CACHE", str(tmp_path))
    assert nvrtc.cubin(str(HERE.parents[1] / "benchmarks/suites/fleet/fma.cu"), "sm_90", ())[:4] == b"\x7fELF"


@pytest.mark.skipif(nvrtc.version() is None, reason="needs cuda-core and NVRTC")
def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LEETDIST_CACHE", str(tmp_path / "file" / "below"))
    assert (
        nvrtc.cubin(NAME, "sm_90", (("DK", 32), ("IN", 2), ("OUT", 2), ("VECTOR", 4), ("BY_TOKEN", 0)))[:4]
        == b"\x7fELF"
    )
