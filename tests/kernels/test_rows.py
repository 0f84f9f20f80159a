"""Whole sequences of short tiles without states in memory (kernels/constant_decay/cuda/rows.py): on the CPU, emulated,
and on a Hopper GPU; and compiled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import ptxas
import pytest
import torch
from emulated import emulated
from test_hopper_cuda import OWN, SHARED_MEMORY
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, launches, rows
from leetdist.kernels.constant_decay.pytorch import block
from leetdist.reference import relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_A_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")],
)


@pytest.fixture(params=["emulated", ON_A_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with emulated():
        yield "cpu"


def drawn(device: str, tokens: int, size: tuple[int, int], dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    """a, b, c and log_decay: two heads, of which b has one."""
    own = (2, size[0]), (1, size[0]), (2, size[1])
    found = [torch.randn(batch, tokens, heads, dim).to(device, dtype).transpose(1, 2) for heads, dim in own]
    return [*found, torch.tensor([-0.3, -0.01]).to(device)]


def folded(states: Tensor, log_decay: Tensor, tiles: Tiles, *, reverse: bool) -> Tensor:
    """As the GPU's fold: one fused multiply-add a tile. (In fp64 a product of two is exact.)"""
    if states.is_cuda:
        from leetdist.kernels.constant_decay.triton import fold

        fold.fold(states, None, log_decay, tiles, reverse=reverse)
        return states
    log2e = torch.tensor(1.4426950408889634)
    for first, end in zip(tiles.first_tile, tiles.first_tile[1:], strict=False):
        carry = torch.zeros_like(states[:, :, 0])
        for tile in range(end - 1, first - 1, -1) if reverse else range(first, end):
            keep = torch.exp2((log_decay * tiles.spans[tile][1] * log2e).double()).float()[:, None, None]
            added = states[:, :, tile].clone()
            states[:, :, tile] = carry
            carry = (keep.double() * carry + added).float()
    return states


def by_steps(
    x: list[Tensor], tiles: Tiles, *, reverse: bool, transposed: bool, sum_scale: float, **scales: Any
) -> Tensor:
    a, b, c, log_decay = x
    given = (c, b) if transposed else (b, c)
    states = hopper.tile_states(*given, log_decay, tiles, reverse=reverse, scale=sum_scale)
    states = folded(states, log_decay, tiles, reverse=reverse)
    states = states.mT if transposed else states
    return hopper.tile_outputs(a, b, c, states, log_decay, tiles, reverse=reverse, out_dtype=a.dtype, **scales)


CASES = [
    (32, (128, 128), BF16, False, False, (0, 128)),
    (64, (64, 64), BF16, True, False, (0, 200)),
    (32, (64, 64), BF16, False, True, (0, 100)),
    (64, (64, 64), FP16, True, True, (0, 3, 140, 140, 333)),
    (16, (48, 80), FP16, True, True, (0, 40, 56, 99)),
    (16, (64, 200), BF16, False, False, (0, 67)),
    (64, (128, 128), FP16, False, True, (0, 130)),
    (128, (64, 64), BF16, False, False, (0, 400)),
    (128, (64, 128), FP16, True, False, (0, 3, 140, 140, 533)),
    (128, (128, 64), BF16, True, True, (0, 300)),
    (256, (48, 80), BF16, False, True, (0, 768)),
    (256, (64, 64), FP16, False, False, (0, 600, 1112)),
    (256, (96, 64), BF16, True, True, (0, 540)),
]


@pytest.mark.parametrize(("tile", "size", "dtype", "reverse", "transposed", "bounds"), CASES)
def test_bits_of_the_three_steps(
    device: str,
    tile: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    reverse: bool,
    transposed: bool,
    bounds: tuple[int, ...],
) -> None:
    tiles = Tiles(tile, bounds)
    x = drawn(device, bounds[-1], size, dtype)
    options: dict[str, Any] = {"reverse": reverse, "transposed": transposed, "scale": 0.3, "sum_scale": 0.3}
    options |= {"state_scale": 1.0} if reverse else {"state_scale": 0.3, "sum_scale": 1.0}
    found = rows.row_outputs(*x, tiles, **options)
    assert torch.equal(found, by_steps(x, tiles, **options))
    whole = Tiles(bounds[-1], bounds)
    scales = {"scale": 0.3, "state_scale": 0.3, "out_dtype": torch.float64}
    zeros = torch.zeros(1, 2, whole.count, *size, dtype=torch.float64, device=device)
    right = block.tile_outputs(*(y.double() for y in x[:3]), zeros, x[3].double(), whole, reverse=reverse, **scales)
    assert relative_error(found, right) < (3e-3 if dtype == BF16 else 4e-4)


@pytest.mark.parametrize(("reverse", "transposed"), [(False, False), (True, True)])
def test_what_is_not_finite_reaches_as_far(device: str, reverse: bool, transposed: bool) -> None:
    """To the sequence's other end, and no further than with states in memory."""
    tiles = Tiles(32, (0, 100, 150))
    x = drawn(device, 150, (64, 64), BF16)
    options: dict[str, Any] = {"reverse": reverse, "transposed": transposed, "scale": 0.3, "state_scale": 0.3}
    good = rows.row_outputs(*x, tiles, **options)
    for operand, token, column, bad in ((1, 20, 3, math.inf), (2, 99, 9, math.nan), (0, 40, 1, math.nan)):
        y = [z.clone() for z in x]
        y[operand][0, 0, token, column] = bad
        found = rows.row_outputs(*y, tiles, **options)
        others = by_steps(y, tiles, **options, sum_scale=1.0)
        torch.testing.assert_close(found, others, rtol=0, atol=0, equal_nan=True)
        seen = range(token, token + 1) if operand == 0 else range(token + 1) if reverse else range(token, 100)
        unseen = [t for t in range(150) if t not in seen]
        assert torch.equal(found[:, :, unseen], good[:, :, unseen])
        assert not found[0, 0, list(seen)].isfinite().all(-1).any()


@pytest.mark.parametrize(("reverse", "transposed"), [(False, False), (False, True), (True, False)])
def test_what_is_not_finite_and_forgotten_ends_with_its_tile(device: str, reverse: bool, transposed: bool) -> None:
    """As with states in memory: of a tile, a head that decays leaves out the chunks far from where its state goes."""
    tiles = Tiles(256, (0, 600))
    x = drawn(device, 600, (64, 64), BF16)
    x[3] = torch.tensor([-2.0, -0.01], device=device)
    options: dict[str, Any] = {"reverse": reverse, "transposed": transposed, "scale": 0.3, "state_scale": 0.3}
    for operand, token, bad in ((1, 300, math.inf), (2, 300, math.nan), (2, 460, math.nan), (1, 20, math.nan)):
        y = [z.clone() for z in x]
        y[operand][0, 0, token, 3] = bad
        found = rows.row_outputs(*y, tiles, **options)
        others = by_steps(y, tiles, **options, sum_scale=1.0)
        torch.testing.assert_close(found, others, rtol=0, atol=0, equal_nan=True)
        assert not found.isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_first_tile_leaves_out_stays_out(device: str, transposed: bool) -> None:
    """Outputs of the tile itself see what its own sum does not, so the two are not one there, even from zero."""
    tiles = Tiles(256, (0, 400))
    x = [torch.zeros(1, 1, 400, 64, dtype=BF16, device=device) for _ in range(3)]
    x[0][:], x[1][:, :, :64], x[2][:, :, :64] = 1.0, 1e18, 1e18
    log_decay = torch.tensor([-0.87], device=device)
    options: dict[str, Any] = {"reverse": False, "transposed": transposed, "scale": 0.3, "state_scale": 0.3}
    found = rows.row_outputs(*x, log_decay, tiles, **options)
    assert torch.equal(found, by_steps([*x, log_decay], tiles, **options, sum_scale=1.0))
    assert found[:, :, 192:256].any()
    assert not found[:, :, 256:].any()


def test_forward_has_one_scale() -> None:
    """Else a first tile's own sum, which nothing has scaled, would not be what its outputs read."""
    x = drawn("cpu", 600, (64, 64), BF16)
    options: dict[str, Any] = {"reverse": False, "transposed": False, "scale": 0.3, "state_scale": 1.0}
    with pytest.raises(ValueError, match=r"a scale of 0\.3, a state_scale of 1\.0; forward they are one"):
        rows.row_outputs(*x, Tiles(256, (0, 600)), **options)


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize(
    ("size", "tile", "dtype", "reverse", "transposed"),
    [
        ((128, 128), 32, BF16, False, False),
        ((128, 128), 64, BF16, True, True),
        ((128, 128), 64, FP16, True, False),
        ((64, 64), 16, FP16, False, True),
        ((96, 112), 32, BF16, False, True),
        ((128, 128), 256, BF16, False, False),
        ((128, 128), 256, BF16, False, True),
        ((128, 128), 256, BF16, True, True),
        ((128, 128), 256, FP16, True, True),
        ((128, 128), 2048, FP16, True, False),
    ],
)
def test_compiles_and_fits(
    size: tuple[int, int], tile: int, dtype: torch.dtype, reverse: bool, transposed: bool
) -> None:
    (part,) = rows.parts(4096, *size, tile, 132)
    for name in launches.OUTPUTS:
        made = rows.defines(name, size, part, dtype, reverse, transposed, tile)
        said = ptxas.report("constant_decay/cuda/row_outputs.cu", "sm_90a", made)
        assert "serialized" not in said, said
        spilled = re.search(r"(\d+) bytes spill stores", said)
        assert spilled, said
        assert name == launches.AGAIN or int(spilled[1]) <= 128, said
    held = launches.walked_rows(size[0]), part.columns, part.groups
    assert 2 * (rows.shared_memory("tile_outputs", *held, transposed, tile) + OWN) <= SHARED_MEMORY
