"""States of any size: with more rows than a kernel takes, block by block, and with fewer than it walks."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any

import emulated_gluon
import pytest
import torch
from emulated import emulated, repeating
from test_bad_tokens import assert_seen_only_behind

import leetdist
from leetdist.kernels.common import blocks
from leetdist.kernels.common.blocks import blocks_of, in_blocks
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper as constant_hopper
from leetdist.kernels.constant_decay.cuda import launches
from leetdist.kernels.constant_decay.pytorch import block as constant_exact
from leetdist.kernels.runtime import triton_release
from leetdist.kernels.token_decay.cuda import hopper as token_hopper
from leetdist.kernels.token_decay.pytorch import block as token_exact
from leetdist.operators import refusals
from leetdist.reference import relative_error
from leetdist.testing.equality import Case, make_tensors
from oracle import assert_matches_oracle

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BOUNDS = {BF16: 3e-3, FP16: 6e-4, FP32: 1e-6}
PACKED, LONG = Tiles(128, (0, 65, 65, 150)), Tiles(768, (0, 700))
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [(256, 256, [(0, 256)]), (384, 256, [(0, 128), (128, 384)]), (7, 3, [(0, 1), (1, 4), (4, 7)]), (2, 3, [(0, 2)])],
)
def test_blocks_are_full_but_the_first(rows: int, most: int, expected: list[tuple[int, int]]) -> None:
    assert blocks_of(rows, most) == expected


def assert_right(
    kernels: Any,
    most: int | None,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    reverse: bool,
    by_token: bool = False,
    wide: bool = False,
    device: str = "cpu",
    tiles: Tiles = PACKED,
) -> None:
    """Outputs and states of four heads against fp64, in places with strides of their own. most: rows of a block."""
    exact, tokens = token_exact if by_token else constant_exact, tiles.num_tokens
    a, b, c = (
        torch.randn(1, tokens, own, dim).to(device, dtype).transpose(1, 2)
        for own, dim in ((4, rows), (2, rows), (4, columns))
    )
    states = torch.randn(1, 4, tiles.count, columns, rows, device=device).mT
    log_decay = -torch.rand(1, 4, tokens) if by_token else torch.tensor([0.0, -0.01, -0.5, -5.0])
    log_decay = log_decay.to(device)
    if by_token:
        log_decay[0, 1, 70] = -math.inf
    options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 0.7}
    of_states, of_outputs = kernels.tile_states, kernels.tile_outputs
    if most is not None:
        of_states, of_outputs = in_blocks(of_states, "tile_states", most), in_blocks(of_outputs, "tile_outputs", most)
    out = torch.full((1, tokens, 6, columns), math.nan, dtype=FP32 if wide else dtype, device=device)
    of_outputs(a, b, c, states, log_decay, tiles, out_dtype=out.dtype, out=out.transpose(1, 2)[:, 1:5], **options)
    added = of_states(b, c, log_decay, tiles, reverse=reverse, scale=0.3)
    doubles = a.double(), b.double(), c.double()
    gate = log_decay.double() if by_token else log_decay
    expected = exact.tile_outputs(*doubles, states.double(), gate, tiles, out_dtype=FP64, **options)
    expected_added = exact.tile_states(*doubles[1:], gate, tiles, reverse=reverse, scale=0.3)
    assert out[:, :, [0, 5]].isnan().all()
    for head in range(4):
        assert relative_error(out[:, :, 1 + head], expected[:, head]) < BOUNDS[dtype]
        assert relative_error(added[:, head], expected_added[:, head]) < min(BOUNDS[dtype], 5e-5)


@pytest.mark.parametrize(
    ("most", "rows", "columns", "dtype", "reverse", "by_token", "wide"),
    [
        (None, 80, 104, FP16, True, False, True),
        (None, 136, 72, BF16, True, False, False),
        (None, 160, 136, BF16, False, True, False),
        (None, 184, 192, FP16, True, False, True),
        (64, 96, 72, BF16, False, False, False),
        (64, 96, 72, FP16, True, True, True),
    ],
)
def test_emulated_hopper(
    most: int | None, rows: int, columns: int, dtype: torch.dtype, reverse: bool, by_token: bool, wide: bool
) -> None:
    """The kernels in CUDA C++, emulated."""
    kernels = token_hopper if by_token else constant_hopper
    with emulated(multiprocessors=1):
        assert_right(kernels, most, rows, columns, dtype, reverse=reverse, by_token=by_token, wide=wide)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "reverse", "by_token", "groups", "tiles"),
    [
        (152, 136, BF16, True, False, 3, LONG),
        (192, 320, FP16, False, True, 3, PACKED),
        (256, 128, BF16, False, False, 2, LONG),
    ],
)
def test_warpgroups_that_share_chunks_have_the_bits_of_one(
    rows: int, columns: int, dtype: torch.dtype, reverse: bool, by_token: bool, groups: int, tiles: Tiles
) -> None:
    """Also where a token of b and one of c are no numbers, and where each place is copied to again and again."""
    kernels, tokens = token_hopper if by_token else constant_hopper, tiles.num_tokens
    a, b, c = (torch.randn(1, 2, tokens, dim).to(dtype) for dim in (rows, rows, columns))
    b[0, 0, 100, rows - 1], c[0, 1, 20, columns - 1] = math.nan, math.inf
    states = torch.randn(1, 2, tiles.count, rows, columns)
    log_decay = -torch.rand(1, 2, tokens) if by_token else torch.tensor([-0.01, -0.05])
    found = []
    for multiprocessors in (0, 1000):
        with emulated(multiprocessors):
            options: dict[str, Any] = {"scale": 0.5, "state_scale": 0.7, "out_dtype": dtype, "reverse": reverse}
            out = kernels.tile_outputs(a, b, c, states, log_decay, tiles, **options)
            found.append((out, kernels.tile_states(b, c, log_decay, tiles, reverse=reverse)))
    programs = 2 * tiles.count
    assert launches.parts(programs, rows, columns, 0)[0].groups == groups
    assert launches.parts(programs, rows, columns, 1000)[0].groups == 1
    for some, one in zip(*found, strict=True):
        assert torch.equal(some.isnan(), one.isnan())
        assert torch.equal(some.nan_to_num(), one.nan_to_num())
    assert 0 < found[0][0].isnan().sum() < found[0][0].numel()


@pytest.mark.parametrize(("batch", "of_a", "by_token"), [(1, 2, False), (1, 4, True), (3, 2, True), (2, 4, False)])
def test_heads_and_sequences_at_a_time_change_no_bit(
    batch: int, of_a: int, by_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as few of them as may be are in memory in fp32."""
    exact, seen = token_exact if by_token else constant_exact, []

    def kernel(*given: Any, onto: torch.Tensor | None = None, out: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(out.shape[:2] if out.dtype == FP32 else None)
        found = exact.tile_outputs(*(x.double() if isinstance(x, torch.Tensor) else x for x in given), **options)
        return out.copy_(found if onto is None else found + onto)

    a, b, c = (
        torch.randn(batch, 150, own, dim).bfloat16().transpose(1, 2) for own, dim in ((of_a, 40), (8, 40), (4, 24))
    )
    states = torch.randn(batch, 8, PACKED.count, 40, 24)
    log_decay = -torch.rand(batch, 8, 150) if by_token else -torch.rand(8)
    options: dict[str, Any] = {"reverse": True, "scale": 0.5, "state_scale": 0.7, "out_dtype": BF16}
    of_outputs = in_blocks(kernel, "tile_outputs", 16)
    whole = of_outputs(a, b, c, states, log_decay, PACKED, **options)
    assert seen == [(batch, 8), (batch, 8), None]
    monkeypatch.setattr(blocks, "PROGRAMS", 1)
    monkeypatch.setattr(blocks, "BYTES", 1)
    seen.clear()
    assert torch.equal(of_outputs(a, b, c, states, log_decay, PACKED, **options), whole)
    least = (1, 8) if batch > 1 else (1, 8 // of_a)
    assert seen == [least, least, None] * (batch if batch > 1 else of_a)
    monkeypatch.setattr(blocks, "BYTES", 4 * 8 * 150 * 24 * batch // 2)
    seen.clear()
    assert torch.equal(of_outputs(a, b, c, states, log_decay, PACKED, **options), whole)
    assert len(seen) == 6


@pytest.mark.real_empty
def test_launches_of_blocks_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of the first call, wherever tensors lie; what outputs are added to is taken once, for all that come
    one after the other."""
    replay = pytest.importorskip("leetdist.kernels.runtime.replay")
    monkeypatch.setattr(blocks, "PROGRAMS", 1)
    monkeypatch.setattr(blocks, "BYTES", 1)
    of_states, of_outputs = (
        in_blocks(getattr(constant_hopper, step), step, 64) for step in ("tile_states", "tile_outputs")
    )

    def call(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, log_decay: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = of_states(b, c, log_decay, PACKED, reverse=True)
        options: dict[str, Any] = {"scale": 0.5, "state_scale": 0.7, "out_dtype": BF16, "reverse": True}
        return states, *(of_outputs(x, y, c, states, log_decay, PACKED, **options) for x, y in ((a, b), (b, a)))

    def drawn() -> list[torch.Tensor]:
        return [*(torch.randn(2, 1, 150, 160)[..., :own].bfloat16() for own in (136, 136, 72)), -torch.rand(1)]

    with repeating() as driver:
        for number in range(4):
            given = drawn()
            found, launches = replay.repeated(call, tuple(given)), driver.launches
            assert launches == (number + 1) * (3 + 2 * 2 * 3 * 2)  # each of two sequences, and a second look
            for x, y in zip(found, call(*given), strict=True):
                assert torch.equal(x, y)
                assert x.stride() == y.stride()
            driver.launches = launches
        (kept,) = replay._kinds.values()
    between = (150 // 64 + PACKED.count) * 2 * 64 * 64 * 4  # bytes of a sequence's outputs in fp32, in whole blocks
    assert 2 * between <= kept.workspace.size < 3 * between


@pytest.mark.parametrize(("dtype", "reverse"), [(FP32, False), (BF16, True)])
def test_emulated_gluon(dtype: torch.dtype, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide kernels for Hopper in Gluon, two programs a tile. They take fp32 in blocks of 128 rows, here of 64."""
    if triton_release.why_not_gluon() is not None:
        pytest.skip(triton_release.why_not_gluon())
    folder = "leetdist.kernels.constant_decay.triton"
    wide = importlib.import_module(f"{folder}.hopper_wide")
    names = [f"{folder}.{name}" for name in ("hopper_lost", "hopper_kernels", "hopper_parts", "hopper_wide_kernels")]
    *_, kernels = emulated_gluon.emulated(*names)
    monkeypatch.setattr(wide, "launch", emulated_gluon.launch)
    for name in ("tile_states_kernel", "tile_outputs_kernel"):
        monkeypatch.setattr(wide, name, getattr(kernels, name))
    assert_right(wide, 64, 104, 136, dtype, reverse=reverse)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "reverse", "by_token"), [(FP32, False, False), (FP16, True, False), (FP32, True, True)]
)
def test_interpreted(dtype: torch.dtype, reverse: bool, by_token: bool) -> None:
    operator = "token" if by_token else "constant"
    block = pytest.importorskip(f"leetdist.kernels.{operator}_decay.triton.block")
    assert_right(block, 16, 40, 24, dtype, reverse=reverse, by_token=by_token)


ON_A_GPU = [  # each compiles kernels of its own
    (32, 32, BF16, False, False),
    (96, 96, BF16, False, False),
    (96, 112, FP16, True, True),
    (160, 192, BF16, True, False),
    (224, 200, FP16, False, True),
    (48, 320, FP16, True, True),
    (256, 512, BF16, False, False),
    (512, 256, BF16, True, False),
    (320, 112, FP16, False, True),
    (192, 128, FP32, False, False),
    (256, 256, FP32, True, False),
]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize(("rows", "columns", "dtype", "reverse", "by_token"), ON_A_GPU)
def test_on_a_gpu(rows: int, columns: int, dtype: torch.dtype, reverse: bool, by_token: bool) -> None:
    """What the table names for these sizes: CUDA C++ for 16 bits, and wide Gluon for fp32."""
    kernels: Any = token_hopper if by_token else constant_hopper
    if dtype == FP32:
        kernels = importlib.import_module("leetdist.kernels.constant_decay.triton.hopper_wide")
    most = refusals.MOST_ROWS_OF_FP32 if dtype == FP32 else refusals.MOST_ROWS
    for tiles in (PACKED, Tiles(512, (0, 1300))):
        assert_right(
            kernels, most, rows, columns, dtype, reverse=reverse, by_token=by_token, wide=reverse, device="cuda",
            tiles=tiles,
        )  # fmt: skip


WIDE_CASES = [
    Case(70, 24, 40, heads=2, kv_heads=1, tile=16, decay="mixed", initial=True, uneven=True),
    Case(70, 40, 24, heads=2, v_heads=1, tile=16, decay="restarts", documents=(0, 33, 70)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_calls(case: Case, seed: int, forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole operator, with blocks of 16 rows: right, and with the same bits in two pieces and in a larger batch."""
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    monkeypatch.setattr(refusals, "MOST_ROWS", 16)
    case = replace(case, method="block")
    assert_matches_oracle(case, torch.device("cpu"), seed)
    if case.documents is not None:
        return
    given = make_tensors(case, torch.device("cpu"), seed).inputs
    q, k, v, log_decay = (given[name] for name in ("q", "k", "v", "log_decay"))
    options: dict[str, Any] = {"method": "block", "tile": case.tile, "return_state": True}
    o, state = leetdist.linear_attention(q, k, v, log_decay, **options)
    first, between = leetdist.linear_attention(*(x[:, :, :32] for x in (q, k, v)), log_decay, **options)
    rest = (x[:, :, 32:].expand(2, -1, -1, -1) for x in (q, k, v))
    then, end = leetdist.linear_attention(*rest, log_decay, initial_state=between.expand(2, -1, -1, -1), **options)
    assert torch.equal(torch.cat((first, then[1:]), 2), o)
    assert torch.equal(end[1:], state)


@pytest.mark.interpreter
@pytest.mark.parametrize("by_token", [False, True])
def test_pieces_of_a_stream(by_token: bool, forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end inside a tile, of which a chunk is kept, and have the bits of one call."""
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    monkeypatch.setattr(refusals, "MOST_ROWS", 16)
    q, k, v = (torch.randn(1, 1, 145, dim) for dim in (40, 40, 24))
    log_decay = -torch.rand(1, 1, 145) if by_token else torch.tensor([-0.01])
    options: dict[str, Any] = {"method": "block", "tile": 128}
    expected = leetdist.linear_attention(q, k, v, log_decay, **options)
    stream = leetdist.stream(None if by_token else log_decay, **options)
    pieces = [x.split([75, 50, 20], 2) for x in (q, k, v, *([log_decay] if by_token else []))]
    o = torch.cat([stream.push(*piece) for piece in zip(*pieces, strict=True)], 2)
    assert stream.state.opened.chunk == 64
    assert torch.equal(o, expected)


@pytest.mark.interpreter
def test_bad_tokens_reach_later_ones_only() -> None:
    block = pytest.importorskip("leetdist.kernels.constant_decay.triton.block")
    tile_outputs = in_blocks(block.tile_outputs, "tile_outputs", 16)
    options = {"tiles": Tiles(64, (0, 70)), "rows": 40, "heads": 1, "reverse": False}
    assert_seen_only_behind(tile_outputs, [31, 32, 66], **options)
