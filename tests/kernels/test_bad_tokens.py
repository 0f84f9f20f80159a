"""`tile_outputs` with a NaN or an infinity in a token: those that do not see it keep their bits, all others show it."""

from __future__ import annotations

import importlib
import math
import random
from functools import partial

import emulated_gluon
import pytest
import torch

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as plain
from leetdist.kernels.runtime import replay, triton_release
from leetdist.reference import relative_error

triton_block = pytest.importorskip("leetdist.kernels.constant_decay.triton.block")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


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
    by_token=False,
):
    """One bad element of b or c after the other, and several at once."""
    a, b, c = (torch.randn(1, heads, tiles.num_tokens, dim).to(device, dtype) for dim in (rows, rows, columns))
    states = torch.randn(1, heads, tiles.count, rows, columns).to(device, torch.promote_types(dtype, torch.float32))
    log_decay = torch.linspace(-0.01, -0.1, heads, device=device)
    if by_token:
        log_decay = log_decay[:, None] * torch.rand(1, heads, tiles.num_tokens, device=device)
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


def assert_lost_by_a_bad_state(tile_outputs, *, dtype, dim, reverse, device=CPU):
    """Its column is lost in its own tile, and a bad row of `a` in itself; all else keeps its bits."""
    tiles = Tiles(128, (0, 300))
    a, b, c = (torch.randn(1, 2, 300, dim, device=device).to(dtype) for _ in range(3))
    states = torch.randn(1, 2, tiles.count, dim, dim, device=device)
    log_decay = torch.tensor([-0.01, -0.1], device=device)
    options = {"reverse": reverse, "scale": 0.5, "state_scale": 1.0, "out_dtype": dtype}
    without = tile_outputs(a, b, c, states, log_decay, tiles, **options)
    lost = torch.zeros_like(without, dtype=torch.bool)
    states[0, 1, 1, dim - 1, dim - 3], lost[0, 1, 128:256, dim - 3] = math.inf, True
    a[0, 1, 290, 5], lost[0, 1, 290] = math.nan, True
    found = tile_outputs(a, b, c, states, log_decay, tiles, **options)
    assert torch.equal(found[~lost], without[~lost])
    assert found[lost].isnan().all()


def assert_on_a_gpu(tile_outputs, *, dtype, **shape):
    """In tiles and documents that end anywhere, and with outputs in fp32."""
    tokens = [0, 63, 64, 127, 128, random.randrange(130, 250), 255, 256, 300, 301, 500]
    for tiles in (Tiles(256, (0, 501)), Tiles(256, (0, 128, 301, 301, 501))):
        for out_dtype in {dtype, torch.float32}:
            options = {"tiles": tiles, "dtype": dtype, "device": GPU, "out_dtype": out_dtype}
            assert_seen_only_behind(tile_outputs, tokens, **options, **shape)


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


GLUON = "leetdist.kernels.constant_decay.triton"


@pytest.fixture
def emulated_hopper(monkeypatch):
    """The launches of the kernels for Hopper in Gluon, by name, which run on the CPU."""
    if triton_release.why_not_gluon() is not None:
        pytest.skip(triton_release.why_not_gluon())
    narrow, wide = (importlib.import_module(f"{GLUON}.{name}") for name in ("hopper", "hopper_wide"))
    names = [f"{GLUON}.{name}" for name in ("hopper_lost", "hopper_kernels", "hopper_parts", "hopper_wide_kernels")]
    _, narrow_kernels, _, wide_kernels = emulated_gluon.emulated(*names)
    for module, kernels in ((narrow, narrow_kernels), (wide, wide_kernels)):
        monkeypatch.setattr(module, "launch", emulated_gluon.launch)
        monkeypatch.setattr(module, "tile_outputs_kernel", kernels.tile_outputs_kernel)
    return {"narrow": narrow.tile_outputs, "wide": wide.tile_outputs}


@pytest.mark.parametrize(
    ("kernels", "dtype", "precision", "rows", "columns"),
    [
        ("narrow", torch.bfloat16, None, 128, 128),
        ("narrow", torch.float16, None, 64, 64),
        ("wide", torch.float32, None, 40, 72),
        ("wide", torch.bfloat16, "high", 64, 136),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_emulated_hopper(emulated_hopper, kernels, dtype, precision, rows, columns, reverse):
    """What Hopper's kernels in Gluon compute, without a GPU: right to begin with, and the bad tokens of documents."""
    tile_outputs, tiles = emulated_hopper[kernels], Tiles(192, (0, 70, 330))
    if precision is not None:
        tile_outputs = partial(tile_outputs, precision=precision)
    a, b, c = (torch.randn(1, 2, 330, dim).to(dtype) for dim in (rows, rows, columns))
    states, log_decay = torch.randn(1, 2, tiles.count, rows, columns), torch.tensor([-0.01, -0.5])
    options = {"reverse": reverse, "scale": 0.5, "state_scale": 1.0}
    for out_dtype in {dtype, torch.float32}:
        found = tile_outputs(a, b, c, states, log_decay, tiles, out_dtype=out_dtype, **options)
        doubles = (x.double() for x in (a, b, c, states))
        expected = plain.tile_outputs(*doubles, log_decay, tiles, out_dtype=torch.float64, **options)
        assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 3e-3)
    shape = {"rows": rows, "columns": columns, "dtype": dtype, "heads": 1}
    assert_seen_only_behind(tile_outputs, [0, 69, 70, 133, 270, 329], reverse=reverse, tiles=tiles, **shape)
    assert_lost_by_a_bad_state(tile_outputs, dtype=dtype, dim=64, reverse=reverse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu(reverse, dtype):
    shapes = [(128, 128), (64, 64)] + ([(256, 64), (256, 128)] if dtype != torch.float32 else [(48, 80)])
    for rows, columns in shapes:
        assert_on_a_gpu(triton_block.tile_outputs, rows=rows, columns=columns, dtype=dtype, reverse=reverse)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "heads"),
    [
        (64, 64, 2),
        (64, 128, 2),
        (128, 64, 2),
        (128, 128, 2),
        (256, 64, 2),
        (256, 256, 2),
        (256, 128, 90),
        (128, 128, 90),
    ],
)
def test_hopper_cuda(rows, columns, heads, by_token, reverse, dtype):
    """Also with more tiles than multiprocessors, where other warpgroups share a tile."""
    hopper = pytest.importorskip("leetdist.kernels.constant_decay.cuda.hopper")
    shape = {"rows": rows, "columns": columns, "dtype": dtype, "heads": heads, "by_token": by_token}
    assert_on_a_gpu(hopper.tile_outputs, reverse=reverse, **shape)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(128, 128, torch.bfloat16), (64, 64, torch.float16), (128, 64, torch.float16)]
)
def test_hopper_gluon(rows, columns, dtype, reverse):
    hopper = pytest.importorskip("leetdist.kernels.constant_decay.triton.hopper")
    assert_on_a_gpu(hopper.tile_outputs, rows=rows, columns=columns, dtype=dtype, reverse=reverse)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision", "rows", "columns"),
    [
        (torch.float32, None, 128, 128),
        (torch.float32, None, 40, 200),
        (torch.bfloat16, "high", 128, 128),
        (torch.bfloat16, None, 256, 256),
        (torch.float16, None, 72, 40),
    ],
)
def test_hopper_wide(dtype, precision, rows, columns, reverse):
    wide = pytest.importorskip("leetdist.kernels.constant_decay.triton.hopper_wide")
    tile_outputs = partial(wide.tile_outputs, precision=precision)
    assert_on_a_gpu(tile_outputs, rows=rows, columns=columns, dtype=dtype, reverse=reverse)


# The module of kernels for Hopper, a dtype and a head size.
ON_HOPPER = [
    *[("cuda.hopper", torch.bfloat16, dim) for dim in (64, 128, 256)],
    *[("triton.hopper", torch.bfloat16, dim) for dim in (64, 128)],
    ("triton.hopper_wide", torch.float32, 128),
    ("triton.hopper_wide", torch.float16, 256),
]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("module", "dtype", "dim"), ON_HOPPER)
def test_hopper_with_a_bad_state(module, dtype, dim, reverse):
    hopper = pytest.importorskip(f"leetdist.kernels.constant_decay.{module}")
    assert_lost_by_a_bad_state(hopper.tile_outputs, dtype=dtype, dim=dim, reverse=reverse, device=GPU)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.real_empty  # what a recorded call may not do
@pytest.mark.parametrize(("module", "dtype", "dim"), ON_HOPPER)
def test_a_repeated_call_walks_again(module, dtype, dim):
    """A recorded call launches the second walk as well, for whatever is bad when it is repeated."""
    hopper = pytest.importorskip(f"leetdist.kernels.constant_decay.{module}")
    tiles = Tiles(128, (0, 300))

    def outputs(a, b, c, states, log_decay):
        options = {"reverse": False, "scale": 0.5, "state_scale": 1.0, "out_dtype": a.dtype}
        return (hopper.tile_outputs(a, b, c, states, log_decay, tiles, **options),)

    inputs = [torch.randn(1, 2, 300, dim, device=GPU).to(dtype) for _ in range(3)]
    inputs += [torch.randn(1, 2, tiles.count, dim, dim, device=GPU), torch.tensor([-0.01, -0.1], device=GPU)]
    outputs(*inputs)  # a thread's first launch binds the device, which is more than a launch
    (without,), repeat = replay.record(outputs, inputs, tuple(inputs))
    assert repeat is not None
    assert torch.equal(repeat(inputs)[0], without)
    for token in (40, 299):
        bad = inputs.copy()
        bad[1] = inputs[1].clone()
        bad[1][0, 1, token, 3] = math.nan
        (found,) = repeat(bad)
        assert torch.equal(found[0, 0], without[0, 0])
        assert torch.equal(found[0, 1, :token], without[0, 1, :token])
        assert found[0, 1, token : (token // 128 + 1) * 128].isnan().all()
