"""`tile_outputs` with a NaN or an infinity in a token: those that do not see it keep their bits, all others show it."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as plain

triton_block = pytest.importorskip("leetdist.kernels.constant_decay.triton.block")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Those in CUDA C++ and Gluon do not walk a tile again yet: a bad token reaches up to 127 before it.
HOPPERS_OWN = pytest.mark.xfail(reason="Hopper's own kernels multiply what they mask", strict=False)


def assert_seen_only_behind(
    tile_outputs,
    tokens,
    *,
    reverse,
    tiles,
    rows=16,
    columns=16,
    dtype=torch.float32,
    device=CPU,
    heads=2,
    out_dtype=None,
):
    """One bad element of b or c after the other, and several at once."""
    a, b, c = (torch.randn(1, heads, tiles.num_tokens, dim).to(device, dtype) for dim in (rows, rows, columns))
    states = torch.randn(1, heads, tiles.count, rows, columns).to(device, torch.promote_types(dtype, torch.float32))
    log_decay = torch.tensor([-0.01, -0.1][:heads], device=device)
    options = {"reverse": reverse, "scale": 0.5, "state_scale": 1.0, "out_dtype": out_dtype or dtype}
    without = tile_outputs(a, b, c, states, log_decay, tiles, **options)
    assert without.isfinite().all()

    def check(*places):
        bad_b, bad_c, lost = b.clone(), c.clone(), torch.zeros_like(without, dtype=torch.bool)
        for operand, token, column, value in places:
            (bad_b if operand == "b" else bad_c)[0, -1, token, column] = value
            begin, length = next(span for span in tiles.spans if sum(span) > token)
            seen = slice(begin, token + 1) if reverse else slice(token, begin + length)
            lost[0, -1, seen, slice(None) if operand == "b" else column] = True
        found = tile_outputs(a, bad_b, bad_c, states, log_decay, tiles, **options)
        assert torch.equal(found[~lost], without[~lost]), places
        assert not found[lost].isfinite().any(), places

    for token in tokens:
        for operand, dim in (("b", rows), ("c", columns)):
            check((operand, token, random.randrange(dim), random.choice((math.nan, math.inf, -math.inf))))
    check(*((operand, token, 0, math.nan) for token in tokens[1:3] for operand in "bc"))
    check(("c", tokens[0], 1, math.inf), ("c", tokens[-1], 2, math.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_pytorch(reverse, dtype):
    tiles = Tiles(256, (0, 300))
    assert_seen_only_behind(plain.tile_outputs, [0, 127, 128, 255, 299], reverse=reverse, tiles=tiles, dtype=dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_interpreted(reverse, dtype):
    options = {"reverse": reverse, "tiles": Tiles(128, (0, 150)), "dtype": dtype, "heads": 1}
    assert_seen_only_behind(triton_block.tile_outputs, [63, 64, 140], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("hopper", [pytest.param("1", marks=HOPPERS_OWN), "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu(reverse, dtype, hopper, backend, monkeypatch):
    monkeypatch.setitem(os.environ, "LEETDIST_HOPPER", hopper)
    if backend is None:
        monkeypatch.delenv("LEETDIST_BACKEND", raising=False)
    else:
        monkeypatch.setitem(os.environ, "LEETDIST_BACKEND", backend)
    shapes = [(128, 128), (64, 64)] + ([(256, 64), (256, 128)] if dtype != torch.float32 else [(48, 80)])
    tokens = [0, 63, 64, 127, 128, random.randrange(130, 250), 255, 256, 300, 301, 500]
    for rows, columns in shapes:
        for tiles in (Tiles(256, (0, 501)), Tiles(256, (0, 128, 301, 301, 501))):
            shape = {"tiles": tiles, "rows": rows, "columns": columns, "dtype": dtype, "device": GPU}
            assert_seen_only_behind(triton_block.tile_outputs, tokens, reverse=reverse, **shape)
            if dtype != torch.float32:
                wide = {**shape, "out_dtype": torch.float32}
                assert_seen_only_behind(triton_block.tile_outputs, tokens[2:5], reverse=reverse, **wide)
