"""Decoding: tokens together or one by one, any slots, any ages, drafts rolled back; all bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import leetdist
from leetdist.reference import recurrence, relative_error

H, DK, DV = 4, 16, 24
LOG_DECAY = torch.tensor([0.0, -1e-3, -0.1, -3.0])


def inputs(batch: int, tokens: int, kv_heads: int = H, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    heads = (H, kv_heads, kv_heads)
    return [torch.randn(batch, h, tokens, d).to(dtype) for h, d in zip(heads, (DK, DK, DV), strict=True)]


def one_by_one(tensors: list[Tensor], state: Tensor, log_decay: Tensor = LOG_DECAY) -> tuple[Tensor, Tensor]:
    """The oracle: linear_attention_step for each token."""
    outputs = []
    for t in range(tensors[0].shape[2]):
        own = log_decay if log_decay.ndim == 1 else log_decay[:, :, t : t + 1]
        o, state = leetdist.linear_attention_step(*(x[:, :, t : t + 1] for x in tensors), state, own, scale=0.3)
        outputs.append(o)
    return torch.cat(outputs, 2), state


@pytest.mark.interpreter
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_in_triton_are_single_steps(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Slots, lengths, grouped heads, odd sizes: one kernel, with the bits of the one-token kernel."""
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [x.to(device) for x in inputs(3, 4, 2, dtype)]
    log_decay, slots, lengths = LOG_DECAY.to(device), [4, 0, 2], [4, 0, 3]
    pool = torch.randn(6, H, DK, DV, device=device)
    before = pool.clone()
    index, kept = torch.tensor(slots, device=device), torch.tensor(lengths, device=device)
    o = leetdist.linear_attention_steps(*tensors, pool, log_decay, scale=0.3, index=index, lengths=kept)
    for row, slot in enumerate(slots):
        state = before[slot : slot + 1]
        after = state
        for t in range(4):
            token = [x[row : row + 1, :, t : t + 1] for x in tensors]
            expected, state = leetdist.linear_attention_step(*token, state, log_decay, scale=0.3)
            assert torch.equal(o[row : row + 1, :, t : t + 1], expected)
            after = state if t < lengths[row] else after
        assert torch.equal(pool[slot : slot + 1], after)
    assert torch.equal(pool[[1, 3, 5]], before[[1, 3, 5]])

    rounded = before.bfloat16()  # and bf16 states, rounded once a call
    leetdist.linear_attention_steps(*tensors, rounded, log_decay, scale=0.3, index=index, lengths=kept)
    exact = before.bfloat16().float()
    leetdist.linear_attention_steps(*tensors, exact, log_decay, scale=0.3, index=index, lengths=kept)
    if device == "cuda":
        assert torch.equal(rounded, exact.bfloat16())
    else:  # the interpreter cuts where the GPU rounds to nearest
        torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)


@pytest.mark.interpreter
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # Triton's kernel, and on a GPU PyTorch's
def test_a_slot_that_is_none_changes_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Values that the host does not see: such rows get NaN, and every other row what it is alone. Views are read."""
    cuda = torch.cuda.is_available()
    if not cuda and dtype == torch.float64:
        pytest.skip("the interpreter has no kernel for it")
    device = "cuda" if cuda else "cpu"
    if not cuda:
        monkeypatch.setenv("LEETDIST_BACKEND", "triton")
        monkeypatch.setattr("leetdist.inference.checks.host_values", lambda x: None)
    tensors = [x.to(device) for x in inputs(8, 3, dtype=dtype)]
    log_decay = LOG_DECAY.to(device).repeat_interleave(2)[::2]
    slots, kept = [5, 7, -1, 2**40, 0, 0, 3, 1], [2, 1, 3, 1, 4, -1, 3, 0]
    good = [0, 6, 7]
    index = torch.tensor([[slot, 4] for slot in slots], device=device)[:, 0]
    lengths = torch.tensor([[length, 1] for length in kept], device=device)[:, 0]
    pool = torch.randn(7, H, DK, DV, device=device, dtype=dtype)
    expected = pool.clone()
    o = leetdist.linear_attention_steps(*tensors, pool, log_decay, index=index, lengths=lengths)
    few, where = [x[good] for x in tensors], torch.tensor([slots[row] for row in good], device=device)
    few_kept = torch.tensor([kept[row] for row in good], device=device)
    right = leetdist.linear_attention_steps(*few, expected, log_decay.contiguous(), index=where, lengths=few_kept)
    assert torch.equal(pool, expected)
    assert torch.equal(o[good], right)
    assert o[[row for row in range(8) if row not in good]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_views_of_slots_and_lengths(dtype: torch.dtype) -> None:
    tensors, pool = inputs(3, 2), torch.randn(6, H, DK, DV)
    expected = pool.clone()
    index, lengths = torch.tensor([[5, 9], [0, 9], [2, 9]], dtype=dtype)[:, 0], torch.tensor([1], dtype=dtype).expand(3)
    o = leetdist.linear_attention_steps(*tensors, pool, LOG_DECAY, index=index, lengths=lengths)
    right = leetdist.linear_attention_steps(
        *tensors, expected, LOG_DECAY, index=index.contiguous().long(), lengths=lengths.contiguous().long()
    )
    assert torch.equal(o, right)
    assert torch.equal(pool, expected)
    # A row that keeps nothing may share a slot with one that does.
    for rows in ([5, 5], [1, 0]), ([5, 5], [0, 1]):
        shared, single = pool.clone(), pool.clone()
        two = [x[:2] for x in tensors]
        index, lengths = torch.tensor(rows[0], dtype=dtype), torch.tensor(rows[1], dtype=dtype)
        leetdist.linear_attention_steps(*two, shared, LOG_DECAY, index=index, lengths=lengths)
        live = rows[1].index(1)
        one = [x[live : live + 1] for x in tensors]
        leetdist.linear_attention_steps(*one, single, LOG_DECAY, index=index[:1], lengths=torch.tensor([1]))
        assert torch.equal(shared, single)


@given(data=st.data())
def test_steps_of_any_slots_are_single_steps(data: st.DataObject) -> None:
    """B requests in any slots keep any number of their T tokens: each is what it is alone, one token at a time."""
    batch, tokens = data.draw(st.integers(1, 5), "batch"), data.draw(st.integers(1, 4), "tokens")
    slots = data.draw(st.permutations(range(7)), "slots")[:batch]
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch), "lengths")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    torch.manual_seed(batch)
    tensors = inputs(batch, tokens, data.draw(st.sampled_from([1, 2, 4]), "kv heads"), dtype)
    log_decay = LOG_DECAY
    if data.draw(st.booleans(), "by token"):
        log_decay = LOG_DECAY[:, None] * torch.rand(batch, H, tokens)
    pool = torch.randn(7, H, DK, DV)
    before = pool.clone()
    o = leetdist.linear_attention_steps(
        *tensors, pool, log_decay, scale=0.3, index=torch.tensor(slots), lengths=torch.tensor(lengths)
    )
    for row, (slot, kept) in enumerate(zip(slots, lengths, strict=True)):
        mine = [x[row : row + 1] for x in tensors]
        own = log_decay if log_decay.ndim == 1 else log_decay[row : row + 1]
        expected, _ = one_by_one(mine, before[slot : slot + 1], own)
        assert torch.equal(o[row : row + 1], expected)
        state = before[slot][None]
        if kept:
            _, state = one_by_one([x[:, :, :kept] for x in mine], state, own)
        assert torch.equal(pool[slot : slot + 1], state)
    others = [slot for slot in range(7) if slot not in slots]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_agree_with_the_reference(dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 6, dtype=dtype)
    by_token = torch.where(torch.rand(2, H, 6) < 0.2, -float("inf"), -torch.rand(2, H, 6)).to(dtype)
    for tensors, log_decay in (((q, k, v), LOG_DECAY), ((q[:, :1], k[:, :2], v), by_token)):
        states = torch.randn(2, H, DK, DV, dtype=dtype)
        expected, last = recurrence(*tensors, log_decay, scale=0.3, initial_state=states)
        o = leetdist.linear_attention_steps(*tensors, states, log_decay, scale=0.3)
        bound = 1e-6 if dtype == torch.float32 else 1e-14
        assert relative_error(o, expected) < bound
        assert relative_error(states, last) < bound


def test_drafts_are_verified_and_rolled_back_exactly() -> None:
    """Speculative decoding: a prefix of the draft is accepted, and no trace of the rest is left."""
    drafts = inputs(3, 5)
    pool = torch.randn(3, H, DK, DV)
    plain = pool.clone()
    nothing, accepted = torch.tensor([0, 0, 0]), torch.tensor([2, 5, 0])
    verified = leetdist.linear_attention_steps(*drafts, pool, LOG_DECAY, scale=0.3, lengths=nothing)
    assert torch.equal(pool, plain)
    leetdist.linear_attention_steps(*drafts, pool, LOG_DECAY, scale=0.3, lengths=accepted)
    for row, count in enumerate(accepted.tolist()):
        state = plain[row : row + 1]
        for t in range(count):
            token = [x[row : row + 1, :, t : t + 1] for x in drafts]
            o, state = leetdist.linear_attention_step(*token, state, LOG_DECAY, scale=0.3)
            assert torch.equal(verified[row : row + 1, :, t : t + 1], o)
        assert torch.equal(pool[row : row + 1], state)


@pytest.mark.parametrize(("memory", "bound"), [(8, 5e-3), (128, 2e-2), (2048, 6e-2)])
def test_error_of_bf16_states(memory: int, bound: float) -> None:
    """What StatePool's docstring says of rounding the state after each token (and that fp32 has none of it)."""
    tokens, log_decay = 1024, torch.full((2,), -1 / memory)
    q, k, v = (torch.randn(1, 2, tokens, 32) for _ in range(3))
    expected, _ = recurrence(q, k, v, log_decay)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        states = torch.zeros(1, 2, 32, 32, dtype=dtype)
        parts = [
            leetdist.linear_attention_steps(*(x[:, :, t : t + 1] for x in (q, k, v)), states, log_decay)
            for t in range(tokens)
        ]
        errors[dtype] = relative_error(torch.cat(parts, 2), expected)
    assert errors[torch.float32] < 4e-6
    assert bound / 4 < errors[torch.bfloat16] < bound


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_serves_any_requests(dtype: torch.dtype) -> None:
    """A CUDA graph of one step, replayed with other slots and lengths, gives what eager calls give."""
    tensors = [x.cuda() for x in inputs(4, 3)]
    states = torch.randn(9, H, DK, DV, device="cuda").to(dtype)
    eager, log_decay = states.clone(), LOG_DECAY.cuda()
    index, lengths = torch.tensor([0, 1, 2, 3]).cuda(), torch.tensor([3, 3, 3, 3]).cuda()

    def step(pool: Tensor) -> Tensor:
        return leetdist.linear_attention_steps(*tensors, pool, log_decay, scale=0.3, index=index, lengths=lengths)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(states.clone())
    torch.cuda.current_stream().wait_stream(side)
    graph, held = torch.cuda.CUDAGraph(), states.clone()
    with torch.cuda.graph(graph):
        o = step(states)
    states.copy_(held)  # whatever capture did
    for slots, kept in (([5, 1, 8, 2], [1, 0, 3, 2]), ([7, 8, 0, 1], [3, 3, 3, 1])):
        index.copy_(torch.tensor(slots))
        lengths.copy_(torch.tensor(kept))
        for x in tensors:
            x.normal_()
        graph.replay()
        assert torch.equal(o, step(eager))
        assert torch.equal(states, eager)


def test_wrong_arguments_are_refused() -> None:
    tensors, pool = inputs(2, 1), torch.zeros(5, H, DK, DV)
    index = torch.tensor([0, 1])
    steps = leetdist.linear_attention_steps
    with pytest.raises(ValueError, match="a slot for each of the 2 rows, or index"):
        steps(*tensors, pool)
    with pytest.raises(ValueError, match=r"states must have shape .*\(slots, 4, 16, 24\), got \(5, 4, 16, 16\)"):
        steps(*tensors, pool[..., :16], index=index)
    with pytest.raises(ValueError, match=r"states must be torch.float32 or torch.bfloat16, got torch.float16"):
        steps(*tensors, pool.half(), index=index)
    with pytest.raises(ValueError, match=r"index must have shape \(B,\) = \(2,\), got \(3,\)"):
        steps(*tensors, pool, index=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"lengths must be an int32 or int64 tensor, got torch.float32"):
        steps(*tensors, pool, index=index, lengths=torch.ones(2))
    for slots, kept, message in (
        ([0, 5], [1, 1], "index must be from 0 to 4, the last slot, got 5 for row 1"),
        ([-1, 0], [1, 1], "index must be from 0 to 4, the last slot, got -1 for row 0"),
        ([3, 3], [1, 1], "index must name a slot once, got 3 for rows 0 and 1"),
        ([3, 4], [1, 2], "lengths must be from 0 to T = 1, got 2 for row 1"),
        ([3, 4], [-1, 0], "lengths must be from 0 to T = 1, got -1 for row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            steps(*tensors, pool, index=torch.tensor(slots), lengths=torch.tensor(kept))
    assert not pool.any()
    with pytest.raises(ValueError, match=r"index must be an int32 or int64 tensor, got torch.bool"):
        steps(*tensors, pool, index=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="index must be an int32 or int64 tensor, got list"):
        steps(*tensors, pool, index=[0, 1])
    with pytest.raises(ValueError, match="states is changed in place, so it must not be expanded"):
        steps(*tensors, pool[:1].expand(5, H, DK, DV), index=index)
    with pytest.raises(ValueError, match="state is changed in place, so it must not be expanded"):
        leetdist.linear_attention_step(*tensors, pool[:1].expand(2, H, DK, DV), inplace=True)
    stream = leetdist.stream(LOG_DECAY, tile=16)
    stream.push(*inputs(1, 3))
    pool = leetdist.StatePool(2, like=stream.state)
    pool.put(stream.state)
    for slot, message in ((1, "slot 1 is not in use"), (2, "lengths must be 0 where index is the pool's idle slot, 2")):
        with pytest.raises(ValueError, match=message):
            pool.steps(*inputs(1, 1), torch.tensor([slot]))
    with pytest.raises(ValueError, match="index must be a tensor that names the slot of each row, got None"):
        pool.steps(*inputs(1, 1), None)  # type: ignore[arg-type]
    for copies in (0, -1, True, 1.5):
        for fork in (stream.state.fork, lambda copies: pool.fork(0, copies)):
            with pytest.raises(ValueError, match=r"copies must be (at least 1|a whole number), got"):
                fork(copies)
    for slots in ([0, 0], [0, 1], 0):
        with pytest.raises(ValueError, match=r"slots must be|slot 1 is not in use"):
            pool.release(slots)  # type: ignore[arg-type]
    assert pool.take(0).tokens == 3  # and none of it was released
    for nonsense in (0, -1, 2.5, True, "3"):
        with pytest.raises(ValueError, match="slots must be"):
            leetdist.StatePool(nonsense, like=stream.state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="like must be a State, got Tensor"):
        leetdist.StatePool(2, like=stream.state.now)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slot 1 is not in use"):
        pool.take(1)
    with pytest.raises(RuntimeError, match="1 free slots of 2, and 3 are needed"):
        pool.fork(0, 3)
    other = leetdist.stream(LOG_DECAY, tile=32)
    other.push(*inputs(1, 3))
    with pytest.raises(ValueError, match="made with tile 32, wanted 16"):
        pool.put(other.state)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        leetdist.StatePool(2, like=stream.state, dtype=torch.float16)


def test_a_token_has_no_shards() -> None:
    """step and steps under sequence_parallel would be this rank's alone, without a word."""

    def run(group: leetdist.sequence.virtual.VirtualGroup) -> list[str]:
        messages = []
        with leetdist.sequence_parallel(group):
            for call in (leetdist.linear_attention_step, leetdist.linear_attention_steps):
                try:
                    call(*inputs(1, 1), torch.zeros(1, H, DK, DV), LOG_DECAY)
                except ValueError as error:
                    messages.append(str(error))
        return messages

    for messages in leetdist.virtual_ranks(run, 2):
        assert [message.split(" knows no group")[0] for message in messages] == [
            "linear_attention_step",
            "linear_attention_steps",
        ]
    assert leetdist.virtual_ranks(run, 1) == [[]]  # one rank has the whole sequence


def test_states_of_inference_mode_are_changed_anywhere() -> None:
    tensors = inputs(2, 2)
    with torch.inference_mode():
        stream = leetdist.stream(LOG_DECAY, tile=16)
        stream.push(*inputs(2, 5))
        pool = leetdist.StatePool(3, like=stream.state)
        slots = pool.put(stream.state)
        states = stream.state.now.clone()
    expected = states.clone()
    with torch.inference_mode():
        right = leetdist.linear_attention_steps(*tensors, expected, LOG_DECAY)
    assert torch.equal(leetdist.linear_attention_steps(*tensors, states, LOG_DECAY), right)
    assert torch.equal(states, expected)
    assert torch.equal(pool.steps(*tensors, torch.tensor(slots)), right)
    assert torch.equal(pool.states[slots], expected)
    assert pool.tokens.tolist() == [7, 7, 0, 0]
    pool.fork(slots[0], 1)
    token = inputs(2, 1)
    _, new = leetdist.linear_attention_step(*token, states, LOG_DECAY)
    leetdist.linear_attention_step(*token, states, LOG_DECAY, inplace=True)
    assert torch.equal(states, new)


def test_an_exact_pool_of_other_kernels_is_refused() -> None:
    """What Hopper's kernels keep beside the states, others do not move on."""
    stream = leetdist.stream(LOG_DECAY, tile=512)
    stream.push(*inputs(1, 3))
    pool = leetdist.StatePool(2, like=stream.state, exact=True)
    index = torch.tensor(pool.put(stream.state))
    assert pool.open is not None
    pool.open = replace(pool.open, held=torch.zeros(3, H, 1))
    for use in (lambda: pool.steps(*inputs(1, 1), index), lambda: pool.put(stream.state)):
        with pytest.raises(ValueError, match="the pool was made for other kernels than those that the environment"):
            use()
