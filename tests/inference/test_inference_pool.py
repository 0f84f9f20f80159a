"""A pool: requests come, fork, decode and go, each as if it were alone; all bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import leetdist

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


def test_a_pool_of_requests_of_different_ages() -> None:
    """Requests come, fork and go; each decodes as if it were alone."""
    prompts = [inputs(1, n) for n in (5, 40, 16)]
    states = []
    for prompt in prompts:
        stream = leetdist.stream(LOG_DECAY, scale=0.3, tile=16)
        stream.push(*prompt)
        states.append(stream.state)
    pool = leetdist.StatePool(5, like=states[0])
    slots = [slot for state in states for slot in pool.put(state)]
    alone = [state.now for state in states]
    ages = [5, 40, 16]
    for step in range(6):
        if step == 3:  # the first one leaves, the second one forks into its slot
            pool.release([slots.pop(0)])
            alone, ages = [*alone[1:], alone[1]], [*ages[1:], ages[1]]
            slots += pool.fork(slots[0], 1)
            assert slots == [1, 2, 0]
        tensors = inputs(len(slots), 1)
        o = pool.steps(*tensors, torch.tensor(slots))
        for row in range(len(slots)):
            expected, alone[row] = one_by_one([x[row : row + 1] for x in tensors], alone[row])
            assert torch.equal(o[row : row + 1], expected)
            ages[row] += 1
    for slot, state, age in zip(slots, alone, ages, strict=True):
        assert torch.equal(pool.take(slot).now, state)
        assert pool.take(slot).tokens == age == pool.tokens[slot]

    taken = pool.take(slots[0])  # and on in pieces again, from a new grid
    stream = leetdist.stream(state=taken)
    more = inputs(1, 20)
    o, _ = leetdist.linear_attention(
        *more, LOG_DECAY, scale=0.3, method="block", tile=16, initial_state=alone[0], return_state=True
    )
    assert torch.equal(stream.push(*more), o)


def test_a_pool_of_a_decay_a_token() -> None:
    """Each step brings its decays; what is taken out goes on as a stream."""
    stream = leetdist.stream(scale=0.3, tile=16)
    stream.push(*inputs(2, 21), -torch.rand(2, H, 21))
    pool = leetdist.StatePool(3, like=stream.state)
    slots = torch.tensor(pool.put(stream.state)[::-1])
    tensors, decay = inputs(2, 1), -torch.rand(2, H, 1)
    alone = stream.state.now[[1, 0]].clone()
    o = pool.steps(*tensors, slots, log_decay=decay)
    expected, after = leetdist.linear_attention_step(*tensors, alone, decay, scale=0.3)
    assert torch.equal(o, expected)
    assert torch.equal(pool.states[slots], after)
    with pytest.raises(ValueError, match="log_decay must be given: the pool's states are of a decay a token"):
        pool.steps(*tensors, slots)
    taken = pool.take(int(slots[0]))
    assert (taken.tokens, taken.log_decay.shape) == (22, (1, H, 0))
    more, own = inputs(1, 20), -torch.rand(1, H, 20)
    o = leetdist.stream(state=taken).push(*more, own)
    options = {"scale": 0.3, "method": "block", "tile": 16}
    assert torch.equal(o, leetdist.linear_attention(*more, own, initial_state=after[:1], **options))
    constant = leetdist.stream(LOG_DECAY, scale=0.3, tile=16)
    constant.push(*inputs(1, 3))
    with pytest.raises(ValueError, match="made with a decay a head, wanted a decay a token"):
        pool.put(constant.state)
    other = leetdist.StatePool(3, like=constant.state)
    first = torch.tensor(other.put(constant.state))
    with pytest.raises(ValueError, match="log_decay must not be given: the pool's states are of one decay"):
        other.steps(*inputs(1, 1), first, log_decay=own[..., :1])


def test_idle_rows_pad_a_batch() -> None:
    stream = leetdist.stream(LOG_DECAY, tile=16)
    stream.push(*inputs(2, 9))
    pool = leetdist.StatePool(4, like=stream.state)
    first, second = pool.put(stream.state)
    tensors = inputs(4, 1)
    o = pool.steps(*tensors, torch.tensor([second, pool.idle, first, pool.idle]), torch.tensor([1, 0, 1, 0]))
    states = stream.state.now[[1, 0]].clone()
    expected = leetdist.linear_attention_steps(*(x[[0, 2]] for x in tensors), states, LOG_DECAY)
    assert torch.equal(o[[0, 2]], expected)
    assert torch.equal(pool.states[[second, first]], states)
    assert pool.tokens.tolist() == [10, 10, 0, 0, 0]
    assert not pool.states[pool.idle].any()
