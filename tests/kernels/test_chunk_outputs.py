"""Outputs of tiles of one chunk that begin from zero (kernels/constant_decay/cuda/chunk_outputs.cu), by blocks that
walk many: on the CPU, emulated, and on a Hopper GPU; and compiled."""

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

from leetdist.kernels.common.memory import zero_states
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, launches
from leetdist.kernels.constant_decay.pytorch import block
from leetdist.kernels.token_decay.pytorch import block as by_token
from leetdist.reference import relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_A_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")],
)
# Of one chunk or less, but for the third; and one of no token.
TILES = Tiles(128, (0, 3, 67, 137, 137, 138, 160, 223))


@pytest.fixture(params=["emulated", ON_A_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with emulated(multiprocessors=1):  # so that a block walks several tiles, of several heads
        yield "cpu"


def drawn(
    device: str, rows: int, columns: int, dtype: torch.dtype, *, batch: int = 1, gates: bool = False, of_b: int = 1
) -> Any:
    """a, b, c and log_decay: two heads, of which b has so many. Where they share b, a block takes them in turn."""
    sizes = (2, rows), (of_b, rows), (2, columns)
    tokens = [
        torch.randn(batch, TILES.num_tokens, heads, dim).to(device, dtype).transpose(1, 2) for heads, dim in sizes
    ]
    decay = -torch.rand(batch, 2, TILES.num_tokens) if gates else -torch.rand(2)
    return [*tokens, decay.to(device)]


def outputs(x: list[Tensor], *, held: bool = False, tiles: Tiles = TILES, wide: bool = False, **options: Any) -> Tensor:
    """held: from zeros in memory, which take tile_outputs.cu for all tiles."""
    a, b, c, decay = x
    states = zero_states((a.shape[0], 2, tiles.count, a.shape[3], c.shape[3]), FP32, a.device)
    out_dtype = FP32 if wide else a.dtype
    options = {"scale": 0.3, "state_scale": 0.7, "out_dtype": out_dtype} | options
    return hopper.tile_outputs(a, b, c, states.contiguous() if held else states, decay, tiles, **options)


CASES = [
    (64, 64, BF16, True, True, False, 1),
    (48, 80, FP16, False, True, True, 2),
    (128, 128, BF16, False, False, True, 1),
]


@pytest.mark.parametrize(("rows", "columns", "dtype", "reverse", "gates", "wide", "of_b"), CASES)
def test_bits_of_the_kernel_with_states(
    device: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    reverse: bool,
    gates: bool,
    wide: bool,
    of_b: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walked: list[int] = []
    real = launches.walking
    monkeypatch.setattr(hopper, "walking", lambda *sizes: walked.append(real(*sizes)) or walked[-1])
    x = drawn(device, rows, columns, dtype, gates=gates, of_b=of_b)
    options: dict[str, Any] = {"reverse": reverse, "wide": wide}
    found = outputs(x, **options)
    assert len(walked) == 1
    assert torch.equal(found, outputs(x, held=True, **options))
    assert len(walked) == 1
    kernels: Any = by_token if gates else block
    right = kernels.tile_outputs(
        *(y.double() for y in x[:3]), found.new_zeros(1, 2, TILES.count, rows, columns, dtype=torch.float64),
        x[3].double(), TILES, reverse=reverse, scale=0.3, state_scale=0.7, out_dtype=torch.float64,
    )  # fmt: skip
    assert relative_error(found, right) < 3e-3
    alone = Tiles(128, (0, 63))
    last = [y[:, :, 160:].contiguous() if y.ndim > 1 else y for y in x]
    assert torch.equal(outputs(last, tiles=alone, **options), found[:, :, 160:])


@pytest.mark.parametrize(("reverse", "gates"), [(False, True), (True, False)])
def test_what_is_not_finite_reaches_as_far(device: str, reverse: bool, gates: bool) -> None:
    """As with the kernel that has states, also in the tile after it, which the same block walks."""
    x = drawn(device, 64, 64, BF16, gates=gates)
    good = outputs(x, reverse=reverse)
    for operand, token, column, bad in ((1, 20, 3, math.inf), (2, 142, 9, math.nan), (0, 137, 1, math.nan)):
        y = [z.clone() for z in x]
        y[operand][0, 0, token, column] = bad
        found = outputs(y, reverse=reverse)
        torch.testing.assert_close(found, outputs(y, held=True, reverse=reverse), rtol=0, atol=0, equal_nan=True)
        begin, end = next((begin, end) for begin, end in TILES.segments if begin <= token < end)
        others = [t for t in range(TILES.num_tokens) if not begin <= t < end]
        assert torch.equal(found[:, :, others], good[:, :, others])
        seen = range(begin, token + 1) if reverse else range(token, end)
        unseen = [t for t in range(begin, end) if t not in seen]
        assert torch.equal(found[:, :, unseen], good[:, :, unseen])
        assert not found[0, :, token].isfinite().all()


def test_a_place_that_other_tiles_have_written_to(device: str) -> None:
    """Also one that the copy engine does not know, off 16 bytes; in a batch of several."""
    x = drawn(device, 64, 64, BF16, batch=2)
    whole = outputs(x, reverse=False)
    some = Tiles(128, TILES.bounds, (1, 4, 5))
    for offset in (0, 1):
        memory = torch.full((2, TILES.num_tokens, 2, 64 + 8 * offset), 5.0, dtype=BF16, device=device)
        place = memory[..., offset : 64 + offset].transpose(1, 2)
        outputs(x, reverse=False, tiles=some, out=place)
        written = [token for begin, count in some.spans for token in range(begin, begin + count)]
        assert torch.equal(place[:, :, written], whole[:, :, written])
        assert (place[:, :, [t for t in range(TILES.num_tokens) if t not in written]] == 5.0).all()


def test_tiles_up_to() -> None:
    short, rest = TILES.up_to(64)
    assert short.spans == ((0, 3), (3, 64), (137, 1), (138, 22), (160, 63))
    assert rest.spans == ((67, 70),)
    assert TILES.up_to(64)[0] is short
    one = Tiles(128, (0, 64))
    assert one.up_to(64)[0] is one
    assert not one.up_to(64)[1].count
    assert one.up_to(63)[1] is one
    assert Tiles(128, TILES.bounds, (0, 2)).up_to(64)[0].spans == ((0, 3),)


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize(
    ("rows", "columns", "wide", "reverse", "token"),
    [
        (128, 128, False, False, False),
        (128, 128, True, True, True),
        (64, 64, False, False, False),
        (256, 256, False, True, False),
        (80, 112, False, False, True),
    ],
)
def test_compiles_and_fits(rows: int, columns: int, wide: bool, reverse: bool, token: bool) -> None:
    part = launches.all_columns(columns)
    held = launches.walked_rows(rows), part.columns, part.groups
    made = launches.defines(launches.CHUNK_OUTPUTS, *held, BF16, wide, reverse, token, size=(rows, columns))
    said = ptxas.report("constant_decay/cuda/chunk_outputs.cu", "sm_90a", made)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert int(spilled[1]) == 0, said
    assert "serialized" not in said, said
    blocks = launches.walking(rows, columns, 1)
    assert blocks * (launches.shared_memory(launches.CHUNK_OUTPUTS, *held, token) + OWN) <= SHARED_MEMORY
