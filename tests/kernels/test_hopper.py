"""The Hopper kernels on a Hopper GPU: against PyTorch in fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from helpers import assert_leaves_out_the_last
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as exact
from leetdist.reference import relative_error

triton_block = pytest.importorskip("leetdist.kernels.constant_decay.triton.block")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TILES = [Tiles(256, (0, 256)), Tiles(512, (0, 1300)), Tiles(128, (0, 128, 300, 300, 301, 905))]
# Two roundings of the output's size: its own, and the state's. A head that forgets at once is the size of few numbers,
# and off by more than the 2.4e-3 and 3e-4 of the others.
ERROR = {torch.bfloat16: 3e-3, torch.float16: 6e-4}
ERROR_OF_STATES = 5e-5
# Kernels in Gluon take seconds each to compile.
SHAPES = [
    (backend, dtype, rows, columns)
    for backend in ("cuda", "gluon")
    for dtype in (torch.bfloat16, torch.float16)
    for rows, columns in ((128, 128), (64, 64), (64, 128), (128, 64), (256, 256), (256, 64), (256, 128), (128, 256))
    if backend == "cuda" or (rows == columns <= 128 and (dtype == torch.bfloat16) == (rows == 128))
]


def kernels_of(backend: str) -> SimpleNamespace:
    """The kernels in CUDA C++, or those in Gluon that serve where cuda-core is missing."""
    module = pytest.importorskip(f"leetdist.kernels.constant_decay.{'cuda' if backend == 'cuda' else 'triton'}.hopper")
    return SimpleNamespace(tile_states=module.tile_states, tile_outputs=module.tile_outputs, fold=triton_block.fold)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: f"{tiles.size}-{tiles.bounds[-1]}")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", ["BHND", "BNHD"])
@pytest.mark.parametrize(("backend", "dtype", "rows", "columns"), SHAPES)
def test_against_fp64(backend, order, dtype, rows, columns, reverse, tiles):
    kernels = kernels_of(backend)

    def draw(heads, dim):
        if order == "BHND":
            return torch.randn(2, heads, tiles.num_tokens, dim, device="cuda").to(dtype)
        return torch.randn(2, tiles.num_tokens, heads, dim, device="cuda").to(dtype).transpose(1, 2)

    a, b, c = draw(4, rows), draw(2, rows), draw(2, columns)
    log_decay = torch.tensor([0.0, -0.01, -0.5, -5.0], device="cuda")
    # A state beyond fp16's range, which the kernels must hold all the same.
    states = 1e6 * torch.randn(2, 4, tiles.count, rows, columns, device="cuda")
    options = {"reverse": reverse, "scale": 1e-6, "state_scale": 1e-6}
    out = torch.full((2, 4, tiles.num_tokens, columns), math.nan, dtype=dtype, device="cuda")
    kernels.tile_outputs(a, b, c, states, log_decay, tiles, out_dtype=dtype, out=out, **options)
    wide = kernels.tile_outputs(a, b, c, states, log_decay, tiles, out_dtype=torch.float32, **options)
    expected = exact.tile_outputs(
        a.double(), b.double(), c.double(), states.double(), log_decay, tiles,
        out_dtype=torch.float64, **options,
    )  # fmt: skip
    added = kernels.tile_states(b, c, log_decay, tiles, reverse=reverse, scale=0.3)
    expected_added = exact.tile_states(b.double(), c.double(), log_decay, tiles, reverse=reverse, scale=0.3)
    assert_leaves_out_the_last(kernels, b, c, log_decay, tiles, reverse=reverse)
    for head in range(4):
        assert relative_error(out[:, head], expected[:, head]) < ERROR[dtype]
        assert torch.equal(wide[:, head].to(dtype), out[:, head])
        assert relative_error(added[:, head], expected_added[:, head]) < ERROR_OF_STATES


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("backend", "dim"), [("cuda", 128), ("cuda", 256), ("gluon", 128)])
def test_neighbours_and_strides_change_no_bit(backend, dim, reverse):
    """Not: other documents (also of NaN), a tile's place in the row, operands and outputs off 16 bytes, repetition."""
    kernels = kernels_of(backend)
    tiles, dtype = Tiles(256, (0, 200, 701, 1000)), torch.bfloat16
    a, b, c = (torch.randn(1, 2, 1000, dim, device="cuda").to(dtype) for _ in range(3))
    log_decay = torch.tensor([-0.004, -0.3], device="cuda")
    states = torch.randn(1, 2, tiles.count, dim, dim, device="cuda")
    options = {"reverse": reverse, "scale": 0.5, "state_scale": 1.0, "out_dtype": dtype}
    out = kernels.tile_outputs(a, b, c, states, log_decay, tiles, **options)
    added = kernels.tile_states(b, c, log_decay, tiles, reverse=reverse)
    alone = Tiles(256, (0, 501))
    for x in (a, b, c):
        x[:, :, :200], x[:, :, 701:] = math.nan, math.nan
    again = kernels.tile_outputs(a, b, c, states, log_decay, tiles, **options)
    added_again = kernels.tile_states(b, c, log_decay, tiles, reverse=reverse)
    assert torch.equal(again[:, :, 200:701], out[:, :, 200:701])
    assert torch.equal(added_again[:, :, 1:3], added[:, :, 1:3])
    many = [x.expand(80, -1, -1, -1) for x in (a, b, c)]  # more tiles than multiprocessors
    in_batch = kernels.tile_outputs(*many, states.expand(80, -1, -1, -1, -1), log_decay, tiles, **options)
    assert torch.equal(in_batch[79, :, 200:701], out[0, :, 200:701])
    added_in_batch = kernels.tile_states(*many[1:], log_decay, tiles, reverse=reverse)
    assert torch.equal(added_in_batch[79, :, 1:3], added[0, :, 1:3])
    odd = [torch.empty(1, 501, 2, dim + 1, dtype=dtype, device="cuda")[..., 1:].transpose(1, 2) for _ in range(4)]
    for x, y in zip(odd, (a, b, c), strict=False):
        x.copy_(y[:, :, 200:701])
    odd[3].fill_(math.nan)
    kernels.tile_outputs(*odd[:3], states[:, :, 1:3], log_decay, alone, out=odd[3], **options)
    assert torch.equal(odd[3], out[:, :, 200:701])
    assert torch.equal(kernels.tile_states(odd[1], odd[2], log_decay, alone, reverse=reverse), added[:, :, 1:3])
