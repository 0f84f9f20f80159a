"""Pieces of a stream inside a tile, on Hopper: a fixed sequence of launches, emulated on the CPU, and on a GPU."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import Driver, near, repeating
from test_open_chunk import ON_A_GPU, TILE, draw, keeps, one_call
from torch import Tensor

import leetdist
from leetdist.inference.running import Running
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, open_chunk
from leetdist.kernels.constant_decay.pytorch import open_chunk as in_pytorch
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.token_decay.cuda import open_chunk as by_token
from leetdist.operators import opened

replay = pytest.importorskip("leetdist.kernels.runtime.replay")


def fold(states: Tensor, initial: Tensor, g: Tensor, tiles: Tiles, *, reverse: bool) -> Tensor:
    """The state after the tiles, and those at their starts in place: as fused products and sums. g: decays, or of a
    decay a token what is kept."""
    keep = (g if g.ndim == 3 else keeps(g, tiles)).double()
    for tile in range(tiles.count):
        after = (initial.double() * keep[..., tile, None, None] + states[:, :, tile].double()).float()
        states[:, :, tile], initial = initial, after
    return initial


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """`stream` on CPU tensors computes with the kernels for Hopper, whose launches are recorded and repeated."""
    kernels: Any = SimpleNamespace(tile_outputs=hopper.tile_outputs, tile_states=hopper.tile_states, fold=fold)

    def known(problem: Any, tile: int, *_: Any) -> opened.Opened:
        token = problem.operator == "token_decay"
        return opened.Opened(kernels, by_token if token else open_chunk, tile, open_chunk.CHUNK, problem.dtype)

    with repeating() as driver:
        monkeypatch.setattr(by_token, "keep_of", in_pytorch.keep_of)  # Triton's launches want a GPU
        monkeypatch.setattr(opened, "_opened_by", known)
        yield driver


def pushed(stream: Any, tensors: list[Tensor], lengths: list[int]) -> Tensor:
    return torch.cat([stream.push(*piece) for piece in zip(*(x.split(lengths, 2) for x in tensors), strict=True)], 2)


@pytest.mark.real_empty
@pytest.mark.parametrize("token", [False, True])
def test_pieces_of_one_length_repeat_their_launches(driver: Driver, token: bool) -> None:
    """With the bits of one call, through the ends of chunks and tiles; states that somebody holds do not change."""
    *tensors, g = draw("cpu", 1, 340, 64, 64, torch.bfloat16, token)
    expected = one_call(*tensors, g, 0.3)
    stream = leetdist.stream(None if token else g, scale=0.3, tile=TILE)
    tensors += [g] * token
    lengths = [20, *[40] * 8]
    first = pushed(stream, [x[:, :, :140] for x in tensors], lengths[:4])
    held = stream.state
    before = {name: x.clone() for name, x in held.parts.items()}
    rest = pushed(stream, [x[:, :, 140:] for x in tensors], lengths[4:])
    assert torch.equal(torch.cat((first, rest), 2), expected)
    assert all(torch.equal(x, before[name]) for name, x in held.parts.items())
    again = pushed(leetdist.stream(state=held), [x[:, :, 140:200] for x in tensors], [60])
    assert torch.equal(again, expected[:, :, 140:200])
    assert any(kept is not None for kept in replay._kinds.values())
    assert None not in replay._kinds.values()


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(("rows", "multiprocessors", "bad"), [(64, 5, False), (128, 7, True), (256, 4, False)])
def test_outputs_of_a_long_piece_are_walked_in_parts(
    driver: Driver, token: bool, rows: int, multiprocessors: int, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several chunks, each from the state that the states' walk passed there; the last part may be empty. What is no
    number is seen by later tokens alone, of its column or, of k, of all."""
    monkeypatch.setattr(cuda_launch, "multiprocessors", lambda device: multiprocessors)
    *tensors, g = draw("cpu", 1, 500, rows, 64, torch.bfloat16, token)
    if bad:
        tensors[2][:, 1, 40, 7], tensors[1][:, :, 310, 3] = math.nan, math.inf
    kernels: Any = hopper if not token else by_token
    expected = kernels.tile_outputs(
        *tensors, torch.zeros(1, 2, 1, rows, 64), g, Tiles(512, (0, 500)),
        reverse=False, scale=0.3, state_scale=0.3, out_dtype=torch.bfloat16,
    )  # fmt: skip
    stream = leetdist.stream(None if token else g, scale=0.3, tile=512)
    found = pushed(stream, tensors + [g] * token, [30, 160, 160, 150])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert bool(expected.isnan().any()) == bad
    assert expected.isfinite().any(-1)[:, :, :300].all()


@pytest.mark.parametrize(("batch", "token_major", "lengths"), [(1, False, 100), (2, True, 150)])
def test_pieces_that_lie_apart_are_read_where_they_lie(
    driver: Driver, batch: int, token_major: bool, lengths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles of them, with the bits of one call; what is left of the last ones is laid out as ever."""
    near()
    *tensors, g = draw("cpu", batch, 2 * TILE + 50, 64, 64, torch.bfloat16, False)
    expected = one_call(*tensors, g, 0.3)
    apart = [tuple(x.clone() for x in piece) for piece in zip(*(x.split(lengths, 2) for x in tensors), strict=True)]
    if token_major:
        apart = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in piece) for piece in apart]
    seen, in_place = [], open_chunk.in_place

    def watched(columns: Any, lengths: list[int]) -> Any:
        seen.append(sum(lengths))
        return in_place(columns, lengths)

    monkeypatch.setattr(open_chunk, "in_place", watched)
    stream = leetdist.stream(g, scale=0.3, tile=TILE)
    outputs = list(stream.map(apart, window=2 * TILE))
    assert torch.equal(torch.cat(outputs, 2), expected)
    assert seen == [2 * TILE]
    assert stream.tokens == 2 * TILE + 50


@pytest.mark.real_empty
@pytest.mark.parametrize("token", [False, True])
def test_a_piece_takes_four_launches_and_no_copies(
    driver: Driver, token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leetdist.inference.pieces.reads_values", lambda log_decay: False)  # as on a GPU
    *tensors, g = draw("cpu", 1, TILE, 64, 64, torch.bfloat16, token)
    stream = leetdist.stream(None if token else g, tile=TILE)
    tensors += [g] * token
    for piece in zip(*(x.split(8, 2) for x in tensors), strict=True):
        before = driver.launches
        with replay.Recorder() as seen:
            stream.push(*piece)
        closes = stream.tokens % open_chunk.CHUNK == 0
        assert driver.launches - before == 3 + closes
        assert closes or stream.tokens == 8 or seen.refused is None  # states are made, and folded


def test_decays_are_summed_as_calls_sum_them(driver: Driver) -> None:
    """In units, whatever the pieces; what is no decay makes NaN of the sum."""
    counted = pytest.importorskip("leetdist.kernels.token_decay.triton.open_chunk").counted
    *tensors, g = draw("cpu", 1, TILE - 1, 64, 64, torch.bfloat16, True)
    for wrong in (None, 0.5, math.nan):
        if wrong is not None:
            g[0, 1, 30] = wrong
        like = leetdist.State(
            torch.zeros(1, 2, 64, 64), *(x[:, :, :0] for x in (tensors[1], tensors[2], g)), tokens=0, tile=TILE
        )
        running = Running(like)
        for piece in zip(*(x.split([25, 70, 32], 2) for x in (*tensors, g)), strict=True):
            running.push(*piece)
        total = running.state().total
        assert total is not None
        torch.testing.assert_close(total, counted(g[:, :, : TILE // 2]), rtol=0, atol=0, equal_nan=True)


def test_tokens_that_later_tokens_cannot_see_are_poisoned(driver: Driver) -> None:
    """What lies beside a piece in memory, or where nothing is laid, has no part in its outputs."""
    *tensors, g = draw("cpu", 2, 100, 64, 128, torch.float16, False)
    expected = one_call(*tensors, g, 1.0)
    around = [torch.full((2, x.shape[1], 130, x.shape[3]), math.nan, dtype=x.dtype) for x in tensors]
    for to, x in zip(around, tensors, strict=True):
        to[:, :, 16:116] = x
    stream = leetdist.stream(g, tile=TILE)
    assert torch.equal(pushed(stream, [x[:, :, 16:116] for x in around], [30, 70]), expected)


@pytest.mark.real_empty
@pytest.mark.parametrize("token", [False, True])
def test_views_mean_their_values(driver: Driver, token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where pieces before, of the same strides, are computed in a way that is known."""
    monkeypatch.setattr("leetdist.inference.pieces.reads_values", lambda log_decay: False)  # as on a GPU
    *tensors, g = draw("cpu", 1, TILE - 8, 64, 64, torch.bfloat16, token)
    expected = one_call(*tensors, g, 0.3)
    forms: list[Callable[[Tensor], Tensor]] = [
        Tensor.contiguous, Tensor.contiguous, Tensor.contiguous, lambda x: torch._neg_view(-x),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
    ]  # fmt: skip
    stream, outputs = leetdist.stream(None if token else g, scale=0.3, tile=TILE), []
    tensors += [g] * token
    for piece, form in zip(zip(*(x.split(24, 2) for x in tensors), strict=True), forms, strict=True):
        outputs.append(stream.push(*map(form, piece)))
    assert torch.equal(torch.cat(outputs, 2), expected)


def test_one_piece_for_all_of_a_batch(driver: Driver) -> None:
    """Expanded, which no map of the copy engine knows."""
    *tensors, g = draw("cpu", 1, 100, 64, 64, torch.bfloat16, False)
    expected = one_call(*tensors, g, 0.3).expand(2, -1, -1, -1)
    stream = leetdist.stream(g, scale=0.3, tile=TILE)
    assert torch.equal(pushed(stream, [x.expand(2, -1, -1, -1) for x in tensors], [30, 70]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slots_in_two_forms_are_copied_whole(driver: Driver, dtype: torch.dtype) -> None:
    """By forks, copies and pickles of the pool, and states that leave it and come back, in any order of sequences."""
    *tensors, g = draw("cpu", 1, 240, 64, 64, dtype, False)
    expected = one_call(*tensors, g, 0.3)
    prompt = leetdist.stream(g, scale=0.3, tile=TILE)
    pushed(prompt, [x[:, :, :60] for x in tensors], [60])
    pool = leetdist.StatePool(4, like=prompt.state, exact=True)
    assert pool.open is not None
    assert pool.open.held is not None
    ages = dict.fromkeys(pool.put(prompt.state), 60)
    pushed(prompt, [x[:, :, 60:126] for x in tensors], [66])
    ages |= dict.fromkeys(pool.put(prompt.state), 126)

    def again(slot: int) -> None:
        state = pool.take(slot)
        pool.release([slot])
        assert pool.put(state) == [slot]

    changes: list[Callable[[int], Any]] = [
        again, lambda slot: copy.deepcopy(pool), lambda slot: pickle.loads(pickle.dumps(pool)),
        lambda slot: ages.update(dict.fromkeys(pool.fork(slot, 1), ages[slot])), again,
    ]  # fmt: skip
    for turn, change in enumerate(changes):
        made = change(turn % 2)
        pool = pool if made is None else made
        slots, count = list(ages), 8 - turn % 2
        given = [torch.cat([x[:, :, ages[slot] :][:, :, :count] for slot in slots]) for x in tensors]
        o = pool.steps(*given, torch.tensor(slots))
        for row, slot in enumerate(slots):
            assert torch.equal(o[row], expected[0, :, ages[slot] :][:, :count]), (turn, slot)
            ages[slot] += count


def test_pools_pickled_by_earlier_versions(driver: Driver) -> None:
    """Without what kernels now read: they say so."""
    *tensors, g = draw("cpu", 1, 8, 64, 64, torch.bfloat16, False)
    prompt = leetdist.stream(g, tile=TILE)
    pushed(prompt, tensors, [8])
    pool = leetdist.StatePool(1, like=prompt.state, exact=True)
    slots = torch.tensor(pool.put(prompt.state))
    vars(pool.open).pop("held")
    with pytest.raises(ValueError, match="the pool was made for other kernels"):
        pickle.loads(pickle.dumps(pool)).steps(*tensors, slots)


@pytest.mark.parametrize("token", [False, True])
def test_sizes_that_steps_have_no_kernel_for_go_on_inside_a_tile(driver: Driver, token: bool) -> None:
    """A prompt in pieces, and tokens on a pool that keeps a chunk and not a tile."""
    *tensors, g = draw("cpu", 1, TILE + 40, 96, 80, torch.bfloat16, token)
    expected = one_call(*tensors, g, 1.0)
    stream = leetdist.stream(None if token else g, tile=TILE)
    tensors += [g] * token
    assert torch.equal(pushed(stream, [x[:, :, :110] for x in tensors], [50, 60]), expected[:, :, :110])
    pool = leetdist.StatePool(1, like=stream.state, exact=True)
    index = torch.tensor(pool.put(stream.state))
    assert pool.open is not None
    assert pool.open.chunk == open_chunk.CHUNK
    for at in range(110, TILE + 40, 6):
        q, k, v, *own = (x[:, :, at : at + 6] for x in tensors)
        o = pool.steps(q, k, v, index, log_decay=own[0] if own else None)
        assert torch.equal(o, expected[:, :, at : at + 6])


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_have_the_bits_of_one_call_on_a_gpu(dtype: torch.dtype) -> None:
    """Lengths that come again, so that their launches are repeated, in both layouts."""
    g = torch.tensor([0.0, -1e-3, -0.1, -3.0], device="cuda")
    for dim, token_major in ((128, False), (64, True)):
        tensors = [torch.randn(2, 9_000, 4, dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3)]
        tensors = tensors if token_major else [x.contiguous() for x in tensors]
        expected, last = leetdist.linear_attention(*tensors, g, method="block", tile=2048, return_state=True)
        stream = leetdist.stream(g, tile=2048)
        assert torch.equal(pushed(stream, tensors, [1, 300, *[100] * 20, *[7] * 57, *[1000] * 6, 300]), expected)
        assert stream._running is not None
        assert torch.equal(stream.state.now, last)
