"""The kernels for Hopper with more than 16 bits inside, `precision="high"`: compiled; on the CPU, emulated; on a Hopper
GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import ptxas
import pytest
import torch
from emulated import emulated
from test_bad_tokens import assert_lost_by_a_bad_state, assert_seen_only_behind
from test_hopper_cuda import OWN, SHARED_MEMORY, SPILLS

from leetdist.kernels.common.memory import zero_states
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import high, launches
from leetdist.kernels.constant_decay.pytorch import block as exact
from leetdist.reference import relative_error

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_A_GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
BOUNDS = {BF16: 1.85e-3, FP16: 2.4e-4, FP32: 1e-5}  # an output's own rounding; that of two numbers
PACKED = Tiles(128, (0, 65, 65, 150))
CASES = [(128, 128, BF16, False), (104, 72, FP16, True)]  # rows, columns, dtype, reverse
ON_A_GPU_TOO = [(64, 64, BF16, True), (128, 192, FP16, False), (160, 128, BF16, True), (256, 256, BF16, False)]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with emulated(1) if request.param == "emulated" else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize(
    ("rows", "groups", "dtype", "wide", "reverse"),
    [
        (128, 2, BF16, False, False),
        (128, 2, FP16, True, True),
        (128, 1, BF16, False, True),
        (64, 1, FP16, False, False),
        (192, 2, BF16, False, False),
        (256, 2, BF16, False, True),
    ],
)
@pytest.mark.parametrize("name", launches.OUTPUTS)
def test_compiles_and_fits(name: str, rows: int, groups: int, dtype: torch.dtype, wide: bool, reverse: bool) -> None:
    made = launches.defines(name, rows, 64, groups, dtype, wide, reverse, high=True)
    said = ptxas.report("constant_decay/cuda/tile_outputs.cu", "sm_90a", made)
    blocks = 1 if name == launches.AGAIN or groups == 2 else 2  # to a multiprocessor
    assert blocks * (launches.shared_memory(name, rows, 64, groups, high=True) + OWN) <= SHARED_MEMORY
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert name == launches.AGAIN or int(spilled[1]) <= SPILLS[wide], said
    assert "serialized" not in said, said


def draw(device: str, rows: int, columns: int, dtype: torch.dtype, heads: int = 2) -> tuple[Any, ...]:
    """a, b, c, states and log_decay of PACKED; the states beyond fp16's range."""
    a, b, c = (torch.randn(1, 150, heads, dim).to(device, dtype).transpose(1, 2) for dim in (rows, rows, columns))
    states = 1e6 * torch.randn(1, heads, PACKED.count, rows, columns, device=device)
    return a, b, c, states, torch.tensor([-0.01, -0.5], device=device)


@pytest.mark.parametrize(("rows", "columns", "dtype", "reverse"), CASES + ON_A_GPU_TOO)
def test_against_fp64(device: str, rows: int, columns: int, dtype: torch.dtype, reverse: bool) -> None:
    if device == "cpu" and (rows, columns, dtype, reverse) in ON_A_GPU_TOO:
        pytest.skip("takes a minute, emulated")
    a, b, c, states, log_decay = draw(device, rows, columns, dtype)
    options: dict[str, Any] = {"reverse": reverse, "scale": 1e-6, "state_scale": 1e-6}
    expected = exact.tile_outputs(
        a.double(), b.double(), c.double(), states.double(), log_decay, PACKED, out_dtype=FP64, **options
    )
    found = {
        out_dtype: high.tile_outputs(a, b, c, states, log_decay, PACKED, out_dtype=out_dtype, **options)
        for out_dtype in (dtype, FP32)
    }
    assert torch.equal(found[dtype], found[FP32].to(dtype))
    for out_dtype, out in found.items():
        assert relative_error(out, expected) < BOUNDS[out_dtype]


@pytest.mark.parametrize("reverse", [False, True])
def test_how_the_work_is_split_changes_no_bit(device: str, reverse: bool) -> None:
    """One warpgroup a block or two; a document alone, and as one of some, whose states are zeros that nobody reads."""
    a, b, c, states, log_decay = draw(device, 64, 128, BF16)
    options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 1.0, "out_dtype": BF16}
    many = 1 if device == "cpu" else 100
    given = (*(x.repeat(many, 1, 1, 1) for x in (a, b, c)), states.repeat(many, 1, 1, 1, 1))
    whole = high.tile_outputs(*given, log_decay, PACKED, **options)
    again = [high.tile_outputs(a, b, c, states, log_decay, PACKED, **options)]
    if device == "cpu":
        with emulated(1000):
            again.append(high.tile_outputs(a, b, c, states, log_decay, PACKED, **options))
        assert launches.parts(6, 64, 128, 1, True)[0].groups == 2
        assert launches.parts(6, 64, 128, 1000, True)[0].groups == 1
    for out in again:
        assert torch.equal(out, whole[:1])
    nothing = zero_states((1, 2, PACKED.count, 64, 128), FP32, a.device)
    none = high.tile_outputs(a, b, c, nothing, log_decay, PACKED, **options)
    last, zeros = (x[:, :, 65:] for x in (a, b, c)), torch.zeros_like(states[:, :, :1])
    alone = high.tile_outputs(*last, zeros, log_decay, Tiles(128, (0, 85)), **options)
    assert torch.equal(none[:, :, 65:], alone)


@pytest.mark.parametrize("reverse", [False, True])
def test_bad_tokens(device: str, reverse: bool) -> None:
    shape: dict[str, Any] = {"rows": 64, "columns": 72, "dtype": BF16, "heads": 1, "device": torch.device(device)}
    assert_seen_only_behind(high.tile_outputs, [0, 64, 70, 149], reverse=reverse, tiles=PACKED, **shape)
    assert_lost_by_a_bad_state(high.tile_outputs, dtype=FP16, dim=64, reverse=reverse, device=torch.device(device))
