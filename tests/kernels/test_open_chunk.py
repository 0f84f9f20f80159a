"""Decoding on Hopper, a few tokens at a time, has the bits of one call: emulated on the CPU, and on a Hopper GPU."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ptxas
import pytest
import torch
from emulated import emulated
from test_hopper_cuda import OWN, SHARED_MEMORY

from leetdist.kernels.common.open_tiles import OpenTiles
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper as constant
from leetdist.kernels.constant_decay.cuda import launches, open_chunk
from leetdist.kernels.token_decay.cuda import hopper as by_token
from leetdist.kernels.token_decay.pytorch.block import transitions

BF16, FP16 = torch.bfloat16, torch.float16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_A_GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
HEADS, TILE, CHUNK = 2, 128, open_chunk.CHUNK
BY_TOKEN = "leetdist.kernels.token_decay.cuda.open_chunk"  # which wants Triton
# Bytes a thread may keep in local memory: where a chunk is closed, one time of 64.
SPILLS = 100


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with emulated() if request.param == "emulated" else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


def draw(device: str, batch: int, tokens: int, rows: int, columns: int, dtype: torch.dtype, token: bool) -> Any:
    """q, k, v and log_decay; k has one head, the others HEADS. Some decays are so strong that chunks are left out."""
    q, k, v = (
        torch.randn(batch, own, tokens, dim).to(device, dtype)
        for own, dim in ((HEADS, rows), (1, rows), (HEADS, columns))
    )
    if not token:
        return q, k, v, torch.tensor([-1e-3, -120.0]).to(device)
    g = -0.1 * torch.rand(batch, HEADS, tokens)
    chance = torch.rand(g.shape)
    g[chance < 0.02], g[chance < 0.005] = -90.0, -math.inf
    g[:, 1, TILE + CHUNK : TILE + CHUNK + 40] = -3.0  # a chunk of which nothing is left at its end
    return q, k, v, g.to(device)


def fold(added: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """States at the tiles' starts; keep: (..., tiles)."""
    if added.is_cuda:
        from leetdist.kernels.constant_decay.triton.fold import fold as on_device

        states = added.clone()
        on_device(states, None, keep, Tiles(TILE, (0, TILE * added.shape[2])), reverse=False)
        return states
    states = torch.zeros_like(added)
    for tile in range(added.shape[2] - 1):
        after = states[:, :, tile].double() * keep[..., tile, None, None].double() + added[:, :, tile].double()
        states[:, :, tile + 1] = after.float()  # as a fused product and sum
    return states


def keeps(g: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """What the fold leaves of a state before a tile."""
    if g.ndim == 1:
        return torch.exp(g * TILE)[:, None].expand(-1, tiles.count)
    if not g.is_cuda:
        return transitions(g, tiles)
    from leetdist.kernels.token_decay.triton.sums import transitions as on_device

    return on_device(g, tiles)


def one_call(q: Any, k: Any, v: Any, g: torch.Tensor, scale: float) -> torch.Tensor:
    tiles, kernels = Tiles(TILE, (0, q.shape[2])), constant if g.ndim == 1 else by_token
    added = kernels.tile_states(k, v, g, tiles, reverse=False)
    states = fold(added, g if g.ndim == 1 and g.is_cuda else keeps(g, tiles))
    return kernels.tile_outputs(
        q, k, v, states, g, tiles, reverse=False, scale=scale, state_scale=scale, out_dtype=q.dtype
    )


def empty(slots: int, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> OpenTiles:
    """Slots of sequences that have not begun; what means nothing is NaN."""
    heads, (rows, columns), device = v.shape[1], (k.shape[3], v.shape[3]), k.device
    token = g.ndim == 3
    keep = None
    if not token:
        keep = keeps(g, Tiles(TILE, (0, TILE)))[:, 0].contiguous()
        if g.is_cuda:
            from leetdist.kernels.constant_decay.triton.fold import fold as on_device

            ones = torch.ones(1, heads, 1, 1, device=device)
            final = on_device(
                torch.zeros(1, heads, 1, 1, 1, device=device), ones, g, Tiles(TILE, (0, TILE)), reverse=False
            )
            assert final is not None
            keep = final.flatten()
    state = slots, heads, rows, columns
    start, walked, own = (torch.zeros(state, device=device) for _ in range(3))
    return OpenTiles(
        TILE, CHUNK, start, walked, own,
        torch.full((slots, k.shape[1], CHUNK, rows), math.nan, dtype=k.dtype, device=device),
        torch.full((slots, heads, CHUNK, columns), math.nan, dtype=k.dtype, device=device),
        torch.full((slots, heads, CHUNK), math.nan, device=device) if token else g, keep,
        torch.zeros(slots, heads, dtype=torch.float64, device=device) if token else None,
        torch.zeros(slots, dtype=torch.int64, device=device),
        torch.zeros(slots, dtype=torch.int32, device=device), open_chunk.held(walked, k.dtype),
    )  # fmt: skip


def decoded(
    open_: OpenTiles, slots: list[int], q: Any, k: Any, v: Any, g: torch.Tensor, scale: float, most: int
) -> torch.Tensor:
    """All outputs, a few tokens a call. Rows keep all, some or none, and their next call takes the rest again."""
    tokens, ages = q.shape[2], [0] * len(slots)
    o = torch.full((q.shape[0], HEADS, tokens, v.shape[3]), math.nan, dtype=q.dtype, device=q.device)
    index = torch.tensor(slots, device=q.device)
    while min(ages) < tokens:
        count = random.randint(1, most)
        lengths = [random.choice((0, count, count, random.randint(0, count))) for _ in slots]
        lengths = [min(length, tokens - age) for length, age in zip(lengths, ages, strict=True)]
        place = torch.tensor([[min(age + i, tokens - 1) for i in range(count)] for age in ages], device=q.device)

        def some(x: torch.Tensor, place: torch.Tensor = place) -> torch.Tensor:
            where = place[:, None, :, None] if x.ndim == 4 else place[:, None]
            return x.gather(2, where.expand(-1, x.shape[1], -1, *x.shape[3:]))

        found = open_chunk.open_steps(
            some(q), some(k), some(v), open_, some(g) if g.ndim == 3 else None,
            scale=scale, index=index, lengths=torch.tensor(lengths, dtype=torch.int32, device=q.device),
        )  # fmt: skip
        for row, age in enumerate(ages):
            there = min(count, tokens - age)
            o[row, :, age : age + there] = found[row, :, :there]
            ages[row] += lengths[row]
    assert open_.tokens[slots].tolist() == ages
    return o


def compare(device: str, rows: int, columns: int, dtype: torch.dtype, token: bool, tokens: int, most: int = 8) -> None:
    q, k, v, g = draw(device, 2, tokens, rows, columns, dtype, token)
    open_ = empty(4, k, v, g)
    for x in (open_.start, open_.walked, open_.own, open_.held):
        assert x is not None
        x[1] = math.nan  # a slot of nobody's
    o = decoded(open_, [2, 0], q, k, v, g, 0.3, most)
    expected = one_call(q, k, v, g, 0.3)
    wrong = (o != expected).any(3).nonzero()
    assert not len(wrong), f"row, head, token {wrong[0].tolist()} of {len(wrong)}"
    assert not open_.arrived.any()
    assert open_.walked is not None
    assert open_.held is not None
    assert torch.equal(open_.held[[2, 0]], open_chunk.held(open_.walked[[2, 0]], dtype))


@pytest.mark.parametrize(("dtype", "token"), [(BF16, False), (FP16, True)])
def test_emulated_has_the_bits_of_one_call(dtype, token):
    random.seed(0)
    with emulated():
        compare("cpu", 64, 64, dtype, token, tokens=TILE + CHUNK + 5)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_few_tokens_at_a_time_have_the_bits_of_one_call(dtype, token, most):
    for rows, columns in ((64, 64), (128, 128), (64, 128), (128, 256), (256, 64)):
        compare("cuda", rows, columns, dtype, token, tokens=3 * TILE + CHUNK + 9, most=most)


def test_another_order_of_the_same_sum_is_seen(device):
    """A chunk that is folded onto the state as if it were a tile, instead of added to it by the walk: the same numbers,
    otherwise rounded."""
    q, k, v, g = draw(device, 1, CHUNK + 8, 64, 64, BF16, False)
    initial = torch.randn(1, HEADS, 64, 64, device=device)
    tiles = Tiles(TILE, (0, CHUNK + 8))
    options: dict[str, Any] = {"reverse": False, "scale": 0.3, "state_scale": 0.3, "out_dtype": BF16}
    expected = constant.tile_outputs(q, k, v, initial[:, :, None].contiguous(), g, tiles, **options)
    states = []
    for tile in (TILE, CHUNK):
        open_ = replace(empty(1, k, v, g), tile=tile, keep=torch.exp(CHUNK * g))
        assert open_.walked is not None
        open_.start.copy_(initial), open_.walked.copy_(initial)
        open_ = replace(open_, held=open_chunk.held(initial, BF16))
        o = torch.cat(
            [
                open_chunk.open_steps(*some, open_, None, scale=0.3, index=None, lengths=None)
                for some in zip(*(x.split(8, 2) for x in (q, k, v)), strict=True)
            ],
            2,
        )
        states.append(open_.walked)
        assert torch.equal(o[:, :, :CHUNK], expected[:, :, :CHUNK])
        if tile == TILE:
            assert torch.equal(o, expected)
    torch.testing.assert_close(*states)
    assert not torch.equal(*states)


@pytest.mark.parametrize("token", [False, True])
def test_what_a_tile_adds_has_the_same_bits_in_parts(device, token):
    _, k, v, g = draw(device, 2, TILE, 64, 64, BF16, token)
    kernels, module = (by_token, pytest.importorskip(BY_TOKEN)) if token else (constant, open_chunk)
    expected = kernels.tile_states(k, v, g, Tiles(TILE, (0, TILE)), reverse=False)[:, :, 0]
    walked, own = (torch.zeros(2, HEADS, 64, 64, device=device) for _ in range(2))
    total = torch.zeros(2, HEADS, dtype=torch.float64, device=device) if token else None
    for at, count in ((0, CHUNK), (CHUNK, TILE - CHUNK)):
        some = slice(at, at + count)
        gate = g[:, :, some] if token else g
        place = torch.full((2,), at, device=device) if at else at
        module.advance(k[:, :, some], v[:, :, some], gate, walked, own, total, tile=TILE, at=place)
    assert torch.equal(own, expected)
    if not token:
        skipped = open_chunk.left_out(g, TILE)
        assert skipped is not None
        assert skipped.tolist() == [0, CHUNK]


def test_left_out_is_what_tiles_leave_out():
    g = torch.tensor([0.0, -1e-3, -0.1, -1.7, -1e3, -math.inf, math.nan])
    skipped = open_chunk.left_out(g, 8192)
    assert skipped is not None
    assert skipped.tolist() == [0, 0, 8192 - 18 * 64, 8192 - 2 * 64, 8192 - 64, 8192 - 64, 0]


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(64, 32, BF16), (128, 64, BF16), (128, 64, FP16), (128, 32, BF16), (256, 64, FP16)]
)
def test_compiles_and_fits(rows, columns, dtype, token):
    said = ptxas.report(
        "constant_decay/cuda/open_chunk.cu", "sm_90a", open_chunk.defines(rows, columns, 1, dtype, token)
    )
    # Blocks of 32 columns are for calls that have not as many as there are multiprocessors.
    blocks = 1 if columns == 32 else (256 if rows > 128 else 512) // (2 * columns)
    assert blocks * (open_chunk.shared_memory(rows, columns, token) + OWN) <= SHARED_MEMORY
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert int(spilled[1]) <= SPILLS, said
    made = open_chunk.defines(rows, columns, 1, dtype, False)
    ptxas.report("constant_decay/cuda/open_held.cu", "sm_90a", made)


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize("token", [False, True])
def test_what_goes_on_from_a_state_compiles_without_spills(token):
    made = launches.defines(launches.ONWARD, 128, 128, 1, BF16, False, False, token)
    said = ptxas.report("constant_decay/cuda/tile_states.cu", "sm_90a", made)
    assert " 0 bytes spill stores" in said, said
    assert "serialized" not in said, said
