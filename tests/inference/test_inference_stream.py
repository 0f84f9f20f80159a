"""Streams: the bits of one call, however the sequence is cut; memory of one piece; shards over ranks."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import leetdist
from leetdist.engine.checks import METHODS, ONE_DEVICE
from leetdist.inference.pieces import as_one, copied
from leetdist.inference.state import State
from leetdist.sequence.grid import default_tile

H, DK, DV = 4, 16, 24
LOG_DECAY = torch.tensor([0.0, -1e-3, -0.1, -3.0])
TILED = [method for method in METHODS if method not in ("auto", *ONE_DEVICE)]


def inputs(tokens: int, batch: int = 1, kv_heads: int = H, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    heads = (H, kv_heads, kv_heads)
    return [torch.randn(batch, h, tokens, d).to(dtype) for h, d in zip(heads, (DK, DK, DV), strict=True)]


def test_a_decay_in_fp64_is_what_a_call_takes_it_for() -> None:
    """Rounded once, to the states' dtype, wherever it enters."""
    tensors, decay = inputs(150), LOG_DECAY.double() * 0.7
    o = leetdist.linear_attention(*tensors, decay, method="block", tile=64)
    stream = leetdist.stream(decay, tile=64)
    assert torch.equal(torch.cat([stream.push(*piece) for piece in pieces_of(tensors, [50, 90])], 2), o)
    prompt = leetdist.stream(decay, tile=64)
    prompt.push(*(x[:, :, :90] for x in tensors))
    state = replace(prompt.state, log_decay=decay)
    more = [x[:, :, 90:91] for x in tensors]
    for own in (None, decay):
        assert torch.equal(leetdist.linear_attention_step(*more, state, own)[0], o[:, :, 90:91])
    pool = leetdist.StatePool(1, like=state, exact=True)
    found = leetdist.linear_attention_steps(*more, pool, decay, index=torch.tensor(pool.put(state)))
    assert torch.equal(found, o[:, :, 90:91])


def steps(batch: int, tokens: int) -> Tensor:
    """A decay a token: weak and strong ones, and the state started anew."""
    values = torch.tensor([-1e-3, -0.2, 0.0, -1e-2, -50.0, -float("inf")])
    return values[torch.randint(len(values), (batch, H, tokens))]


def pieces_of(tensors: list[Tensor], cuts: list[int]) -> list[list[Tensor]]:
    """The tensors cut at these tokens."""
    bounds = [0, *sorted(set(cuts)), tensors[0].shape[2]]
    return [[x[:, :, a:b] for x in tensors] for a, b in pairwise(bounds) if b > a]


@settings(max_examples=80)
@given(data=st.data())
def test_any_pieces_give_the_bits_of_one_call(data: st.DataObject) -> None:
    tile = data.draw(st.sampled_from([16, 64, 256]), "tile")
    tokens = data.draw(st.integers(1, 700), "tokens")
    cuts = data.draw(st.lists(st.integers(1, tokens), max_size=6), "cuts")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), "dtype")
    torch.manual_seed(tokens)
    tensors = inputs(tokens, data.draw(st.integers(1, 3), "batch"), data.draw(st.sampled_from([1, 2, 4])), dtype)
    options = {"scale": 0.3, "tile": tile, "method": data.draw(st.sampled_from(TILED), "method")}
    by_token = data.draw(st.booleans(), "by token")
    if by_token:
        tensors.append(steps(tensors[0].shape[0], tokens))
    given = () if by_token else (LOG_DECAY,)
    o, last = leetdist.linear_attention(*tensors, *given, return_state=True, **options)

    stream = leetdist.stream(*given, **options)
    outputs = [stream.push(*piece) for piece in pieces_of(tensors, cuts)]
    assert torch.equal(torch.cat(outputs, 2), o)
    assert torch.equal(stream.state.now, last)
    assert stream.tokens == tokens


@settings(max_examples=60)
@given(data=st.data())
def test_pieces_that_may_wait_give_the_bits_of_one_call(data: st.DataObject) -> None:
    tokens, by_token = data.draw(st.integers(1, 400), "tokens"), data.draw(st.booleans(), "by token")
    cuts = data.draw(st.lists(st.integers(1, tokens), max_size=20), "cuts")
    window, apart = data.draw(st.integers(1, 500), "window"), data.draw(st.booleans(), "apart in memory")
    torch.manual_seed(tokens)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(tokens, 2)]
    tensors = [*tensors, steps(2, tokens)] if by_token else tensors
    own = () if by_token else (LOG_DECAY,)
    o, last = leetdist.linear_attention(*tensors, *own, method="block", tile=32, return_state=True)
    stream, computed = leetdist.stream(*own, tile=32), []
    pieces = [[x.clone() for x in piece] if apart else piece for piece in pieces_of(tensors, cuts)]
    taken = 0

    def taking() -> Iterator[tuple[Tensor, ...]]:
        nonlocal taken
        for piece in pieces:
            taken += piece[0].shape[2]
            yield tuple(piece)

    for piece, found in zip(pieces, stream.map(taking(), window=window), strict=True):
        assert found.shape[2] == piece[0].shape[2]
        assert taken - stream.tokens < max(window, 32)
        computed.append(found)
    assert torch.equal(torch.cat(computed, 2), o)
    assert torch.equal(stream.state.now, last)


def test_slices_of_one_tensor_are_joined_without_a_copy() -> None:
    x = torch.randn(2, 100, H, DK).transpose(1, 2)[:, 1:, 10:]
    parts = x.split(30, 2)
    whole = as_one(parts, [x.shape[2] for x in parts])
    assert whole is not None
    assert whole.data_ptr() == x.data_ptr()
    assert torch.equal(whole, x)
    negative = torch._neg_view(parts[1])  # the same memory, and other numbers
    for others in ((parts[0], parts[2]), (parts[0], parts[1].clone()), (parts[1], parts[1]), (parts[0], negative)):
        assert as_one(others, [x.shape[2] for x in others]) is None
        found = copied(others)
        assert torch.equal(found, torch.cat(others, 2))
        assert found.stride(1) < found.stride(2)  # its layout stays


def test_storages_that_begin_at_one_place_are_not_one() -> None:
    """NumPy's slices come with as much memory as they have, the first with too little for what lies behind it."""
    array = torch.randn(1, 1, 64, 8).numpy()
    parts = torch.from_numpy(array[:, :, :16]), torch.from_numpy(array)[:, :, 16:]
    assert as_one(parts, [16, 48]) is None
    assert torch.equal(copied(parts), torch.from_numpy(array))


def test_a_nested_piece_is_refused() -> None:
    with pytest.raises(ValueError, match="q must be a dense tensor with strides, got a nested one"):
        leetdist.stream(LOG_DECAY).push(*[torch.nested.nested_tensor([torch.randn(2, 3, 8)])] * 3)


def test_a_caller_may_record_gradients_between_pieces() -> None:
    """Nothing that a stream computes is recorded, and all that its caller does."""
    tensors = [x.requires_grad_() for x in inputs(60)]
    for options in ({}, {"window": 40}):
        pieces = [tuple(x[:, :, i : i + 20] for x in tensors) for i in (0, 20, 40)]
        for o in leetdist.stream(LOG_DECAY, tile=32).map(pieces, **options):
            assert torch.is_grad_enabled()
            assert not o.requires_grad
            if options:  # its caller's own, and no view
                assert o.mul_(torch.ones((), requires_grad=True)).requires_grad
    assert not leetdist.stream(LOG_DECAY, tile=32).push(*tensors).requires_grad


class Stored(torch.utils.data.Dataset[list[Tensor]]):
    """Pieces by their numbers alone, up to an IndexError."""

    def __init__(self, pieces: list[list[Tensor]]) -> None:
        self.pieces = pieces

    def __getitem__(self, number: int) -> list[Tensor]:
        return self.pieces[number]


@pytest.mark.parametrize("window", [None, 40])
def test_pieces_of_a_dataset(window: int | None) -> None:
    tensors = inputs(100)
    stored = Stored(pieces_of(tensors, [30, 70]))
    found = leetdist.stream(LOG_DECAY, tile=16).map(stored, window=window)
    assert torch.equal(torch.cat(list(found), 2), leetdist.linear_attention(*tensors, LOG_DECAY, tile=16))


def test_what_may_not_wait_is_refused() -> None:
    piece = inputs(40)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        list(leetdist.stream(LOG_DECAY).map([piece], window=0))
    stream = leetdist.stream(LOG_DECAY, tile=16)
    outputs = stream.map([piece, [x.half() for x in piece]], window=1000)
    with pytest.raises(ValueError, match=r"this piece must have the dtype of those before it, torch.float32, got"):
        next(outputs)
    q, k, v = piece
    uneven = [(q[:, :, :20], k[:, :, :19], v[:, :, :20]), (q[:, :, 20:], k[:, :, 19:], v[:, :, 20:])]
    with pytest.raises(ValueError, match="k must have q's batch and tokens"):  # although all of them together would do
        next(stream.map(uneven, window=1000))
    with pytest.raises(ValueError, match=r"q must be a tensor, got NoneType"):
        next(stream.map([piece, (None, k, v)], window=1000))
    assert stream.tokens == 0

    def on_a_rank(group: object) -> None:
        list(leetdist.stream(LOG_DECAY, tile=16, group=group).map([piece], window=1000))

    with pytest.raises(ValueError, match="window must be None under a group"):
        leetdist.virtual_ranks(on_a_rank, 2)


@pytest.mark.interpreter
def test_any_pieces_give_the_bits_of_one_call_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    tensors = inputs(150)
    o, last = leetdist.linear_attention(*tensors, LOG_DECAY, method="block", tile=64, return_state=True)
    stream = leetdist.stream(LOG_DECAY, tile=64)
    outputs = [stream.push(*piece) for piece in pieces_of(tensors, [7, 64, 100, 101])]
    assert torch.equal(torch.cat(outputs, 2), o)
    assert torch.equal(stream.state.now, last)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dk", "dv"), [(128, 128), (64, 64), (64, 128)])
def test_any_pieces_give_the_bits_of_one_call_on_a_gpu(dtype: torch.dtype, dk: int, dv: int) -> None:
    """Also from host memory, through the copies beside the compute, in either layout."""
    tokens, tile, cuts = 150_001, 1024, [1, 1000, 1024, 70_000, 140_000]
    log_decay = LOG_DECAY.cuda()
    for token_major in (False, True):
        host = [
            torch.randn(1, tokens, H, d).to(dtype).transpose(1, 2)
            if token_major
            else torch.randn(1, H, tokens, d).to(dtype)
            for d in (dk, dk, dv)
        ]
        host = [x.pin_memory() for x in host]
        tensors = [x.cuda() for x in host]
        o, last = leetdist.linear_attention(*tensors, log_decay, method="block", tile=tile, return_state=True)
        here = leetdist.stream(log_decay, tile=tile)
        there = leetdist.stream(log_decay, tile=tile, device="cuda")
        for stream, source in ((here, tensors), (there, host)):
            out = torch.cat(list(stream.map(tuple(piece) for piece in pieces_of(source, cuts))), 2)
            assert out.device == source[0].device
            assert torch.equal(out.cuda(), o)
            assert torch.equal(stream.state.now, last)


@pytest.mark.gpu
def test_device_memory_does_not_grow_with_a_host_sequence() -> None:
    def peak(tokens: int) -> int:
        q = torch.randn(1, H, tokens, 64, dtype=torch.bfloat16).pin_memory()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        leetdist.stream(tile=1024, device="cuda").push(q, q, q)
        return torch.cuda.max_memory_allocated() - before

    peak(200_000)
    assert peak(1_600_000) <= 1.05 * peak(200_000)


def test_cutting_off_the_grid_by_hand_is_seen() -> None:
    """The comparison can fail: a state handed over inside a tile sums in another order."""
    tensors = inputs(300)
    o = leetdist.linear_attention(*tensors, LOG_DECAY, method="block", tile=64)
    state, outputs = None, []
    for piece in pieces_of(tensors, [100, 150]):
        part, state = leetdist.linear_attention(
            *piece, LOG_DECAY, method="block", tile=64, initial_state=state, return_state=True
        )
        outputs.append(part)
    assert not torch.equal(torch.cat(outputs, 2), o)
    torch.testing.assert_close(torch.cat(outputs, 2), o, rtol=1e-3, atol=1e-3)


def test_the_default_tile_is_that_of_long_sequences() -> None:
    stream = leetdist.stream(LOG_DECAY)
    stream.push(*inputs(20))
    assert stream.state.tile == default_tile(524_288) == default_tile(1 << 40)


def test_one_token_at_a_time_over_several_tiles() -> None:
    tensors = inputs(70, batch=2)
    o = leetdist.linear_attention(*tensors, LOG_DECAY, method="block", tile=16)
    stream = leetdist.stream(LOG_DECAY, tile=16)
    outputs = stream.map(tuple(piece) for piece in pieces_of(tensors, list(range(70))))
    assert torch.equal(torch.cat(list(outputs), 2), o)


@pytest.mark.parametrize("by_token", [False, True])
def test_a_stream_goes_on_from_a_state_forked_and_selected(by_token: bool) -> None:
    prompt, rest, given = inputs(50), inputs(40, batch=3), (LOG_DECAY,)
    if by_token:
        prompt, rest, given = [*prompt, steps(1, 50)], [*rest, steps(3, 40)], ()
    stream = leetdist.stream(*given, scale=0.5, tile=16)
    stream.push(*prompt)
    forked = leetdist.stream(state=stream.state.fork(3))
    outputs = forked.push(*rest)
    for row in range(3):
        whole = [torch.cat((p, r[row : row + 1]), 2) for p, r in zip(prompt, rest, strict=True)]
        o, last = leetdist.linear_attention(*whole, *given, scale=0.5, method="block", tile=16, return_state=True)
        assert torch.equal(outputs[row : row + 1], o[:, :, 50:])
        assert torch.equal(forked.state.select(torch.tensor([row])).now, last)
    assert stream.tokens == 50  # the fork left it alone


def sizes(state: State) -> int:
    return sum(x.untyped_storage().nbytes() for x in (state.boundary, state.k, state.v))


@pytest.mark.real_empty
def test_memory_does_not_grow_with_the_sequence() -> None:
    def piece() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs(10_007)
        return q, k, v

    stream = leetdist.stream(LOG_DECAY, tile=1024)
    kept, peaks = [], []
    for step, _ in enumerate(stream.map(piece() for _ in range(40))):
        kept.append(sizes(stream.state))
        if step in (9, 39):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert stream.tokens == 40 * 10_007
    assert max(kept) <= 4 * (H * DK * DV + H * 1024 * (DK + DV))
    # Thirty pieces more, of 3.8 MB with their outputs: kilobytes.
    assert peaks[1] - peaks[0] < 8_000


def test_wrong_pieces_are_refused() -> None:
    stream = leetdist.stream(LOG_DECAY, tile=16)
    with pytest.raises(ValueError, match="nothing was pushed"):
        _ = stream.state
    q, k, v = inputs(20, batch=2, kv_heads=2)
    stream.push(q, k, v)
    with pytest.raises(ValueError, match=r"heads as in the pieces before, 2, got 4"):
        stream.push(*inputs(20, batch=2))
    with pytest.raises(ValueError, match=r"initial_state must have shape .*= \(1, 4, 16, 24\), got \(2, 4, 16, 24\)"):
        stream.push(*inputs(20, kv_heads=2))
    with pytest.raises(ValueError, match=r"dtype of those before it, torch.float32, got torch.bfloat16"):
        stream.push(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert stream.tokens == 20
    decay = steps(2, 20)
    with pytest.raises(ValueError, match="log_decay must not be given with a piece, the stream has one"):
        stream.push(q, k, v, decay)
    bare = leetdist.stream(tile=16)
    bare.push(q, k, v)
    with pytest.raises(ValueError, match="log_decay must not be given with this piece"):
        bare.push(q, k, v, decay)
    own = leetdist.stream(tile=16)
    for bad, message in ((decay[..., :5], "log_decay must have shape"), (-decay + 1, "log_decay must be <= 0")):
        with pytest.raises(ValueError, match=message):
            own.push(q, k, v, bad)
    with pytest.raises(ValueError, match=r"log_decay of a piece must have shape \(B, H, n\)"):
        own.push(q, k, v, LOG_DECAY)
    own.push(q, k, v, decay)
    with pytest.raises(ValueError, match="log_decay must be given with this piece"):
        own.push(q, k, v)
    with pytest.raises(ValueError, match=r"v must have as many heads as in the pieces before, 2, got 4"):
        own.push(q, k, torch.cat((v, v), 1), decay)
    with pytest.raises(ValueError, match="method must be one that works tile by tile, got 'vanilla'"):
        leetdist.stream(method="vanilla").push(q, k, v)
    with pytest.raises(ValueError, match="tile must be a power of two"):
        leetdist.stream(tile=24).push(q, k, v)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_sharded_stream_is_the_local_one(ranks: int, by_token: bool) -> None:
    """Pieces over ranks, the last one short; every rank ends with the same state and goes on alone."""
    tensors, more, given = inputs(16 * 23 + 5), inputs(9), (LOG_DECAY,)
    if by_token:
        tensors, more, given = [*tensors, steps(1, 16 * 23 + 5)], [*more, steps(1, 9)], ()
    pieces = pieces_of(tensors, [16 * 10, 16 * 11])
    alone = leetdist.stream(*given, tile=16)
    expected = torch.cat([alone.push(*piece) for piece in pieces], 2)

    def run(group: leetdist.sequence.virtual.VirtualGroup) -> tuple[list[Tensor], State, Tensor]:
        with leetdist.sequence_parallel(group):
            stream = leetdist.stream(*given, tile=16)
            outputs = [stream.push(*(leetdist.shard_sequence(x, 2, group, tile=16) for x in piece)) for piece in pieces]
            state = stream.state
        return outputs, state, leetdist.stream(state=state).push(*more)

    results = leetdist.virtual_ranks(run, ranks)
    shards = [torch.cat([outputs[i] for outputs, _, _ in results], 2) for i in range(len(pieces))]
    assert torch.equal(torch.cat(shards, 2), expected)
    after = leetdist.stream(state=alone.state).push(*more)
    for _, state, continued in results:
        assert state.tokens == alone.tokens
        assert state.open == alone.state.open == 5
        assert torch.equal(state.boundary, alone.state.boundary)
        assert torch.equal(state.now, alone.state.now)
        assert torch.equal(continued, after)


def test_a_sharded_stream_says_what_is_wrong_on_every_rank() -> None:
    def pushed(lengths: list[list[int]], bad: bool = False) -> list[str]:
        def run(group: leetdist.sequence.virtual.VirtualGroup) -> str:
            stream = leetdist.stream(LOG_DECAY, tile=16, group=group)
            try:
                for piece in lengths:
                    q, k, v = inputs(piece[group.rank])
                    stream.push(q, k, v[..., :5, :] if bad and group.rank == 1 else v)
            except ValueError as error:
                return str(error)
            return ""

        return leetdist.virtual_ranks(run, 2)

    for message in pushed([[32, 5], [32, 32]]):
        assert "pieces but the last must have a multiple of the tile length 16" in message
    for message in pushed([[40, 5]]):
        assert "last 13 tokens of this piece are one tile of 16, and rank 1 has 5 of them" in message
    first, second = pushed([[32, 32]], bad=True)
    assert second.startswith("v must have q's batch and tokens")
    assert first == f"rank 1 has a bad piece: {second}"
