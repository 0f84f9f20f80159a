"""Calls on one device that are found by how their tensors lie: what they compute, and which are not of that kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rehearsal import rehearsed, replay
from torch import Tensor

import leetdist
from leetdist.engine import ops, repeats

pytestmark = pytest.mark.real_empty

CALLS = 4  # the second is recorded
DECAY = torch.tensor([-0.01, -0.5])


def inputs(seed: int, *, layout: bool = False, tokens: int = 100) -> list[Tensor]:
    """q, k, v, the gradient of o, and an initial state."""
    draw = torch.Generator().manual_seed(seed)
    if layout:
        found = [torch.randn(1, tokens, 2, 16, generator=draw).transpose(1, 2) for _ in range(4)]
    else:
        found = [torch.randn(1, 2, tokens, 16, generator=draw) for _ in range(4)]
    return [*found, torch.randn(1, 2, 16, 16, generator=draw)]


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of calls that were repeated, one after the other."""
    found: list[str] = []
    real = replay.Replay.__call__

    def called(self: Any, *args: Any) -> Any:
        (kind,) = (kind for kind, known in replay._kinds.items() if known is self)
        found.append(kind[0].__name__)
        return real(self, *args)

    monkeypatch.setattr(replay.Replay, "__call__", called)
    return found


def compiled(backend: str) -> Callable[..., Any]:
    """Of a function of its own: what Dynamo keeps of one is limited."""
    return torch.compile(
        lambda *x, **options: leetdist.linear_attention(*x, **options), fullgraph=True, backend=backend
    )


def compare(call: Callable[..., Any], repeat: list[str], expected: list[str], **options: Any) -> None:
    """The same bits call by call as where nothing is recorded; and what was repeated, after the second."""
    wanted = [call(inputs(seed, **options)) for seed in range(CALLS)]
    with rehearsed():
        for seed in range(CALLS):
            found = call(inputs(seed, **options))
            for x, y in zip(found, wanted[seed], strict=True):
                assert torch.equal(x, y), seed
                assert x.stride() == y.stride(), seed
    assert repeat == expected * (CALLS - 2)


@pytest.mark.parametrize("layout", [False, True], ids=["heads first", "tokens first"])
def test_forward(repeated: list[str], layout: bool) -> None:
    def call(x: list[Tensor]) -> Any:
        return leetdist.linear_attention(
            *x[:3], DECAY, scale=0.3, initial_state=x[4], return_state=True, tile=32, method="block"
        )

    compare(call, repeated, ["_forward"], layout=layout)


def test_tiles_alone(repeated: list[str]) -> None:
    """A sequence of one tile has no states."""
    compare(lambda x: [leetdist.linear_attention(*x[:3], DECAY)], repeated, ["_forward"], tokens=16)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_graphs(repeated: list[str], backend: str) -> None:
    operator = compiled(backend)

    def call(x: list[Tensor]) -> Any:
        leaves = [y.requires_grad_() for y in x[:3]]
        o = operator(*leaves, DECAY, scale=0.3, tile=32, method="block")
        return o.detach(), *torch.autograd.grad(o, leaves, x[3])

    compare(call, repeated, ["_forward", "_backward"])


def test_negated_gradients_of_eager_calls() -> None:
    """They lie as others do, and their memory says the opposite."""

    def call(x: list[Tensor], do: Tensor) -> Any:
        leaves = [y.requires_grad_() for y in x[:3]]
        return torch.autograd.grad(leetdist.linear_attention(*leaves, DECAY, tile=32, method="block"), leaves, do)

    with rehearsed():
        for seed in range(CALLS):
            x = inputs(seed)
            for found, wanted in zip(call(x, torch._neg_view(x[3])), call(x, -x[3]), strict=True):
                assert torch.equal(found, wanted)


def test_learnt_decays_have_sums_to_make(repeated: list[str]) -> None:
    """Their backward op is planned, and its launches alone are repeated."""
    given = DECAY.clone().requires_grad_()
    operator = compiled("aot_eager")

    def call(x: list[Tensor]) -> Any:
        leaves = [*(y.requires_grad_() for y in x[:3]), given]
        o = operator(*leaves, scale=0.3, tile=32, method="block")
        return o.detach(), *torch.autograd.grad(o, leaves, x[3])

    compare(call, repeated, ["_forward", "_backward_pass"])


def test_what_is_saved_is_looked_at_in_every_call() -> None:
    q, k, v, do, _ = inputs(0)
    arguments = (q, k, v, DECAY, None, None, 0.5, False, "block", 32, None, "", "", False, False)
    with rehearsed():
        for _ in range(CALLS):
            _, _, states = ops._forward(*arguments)
            ops._backward(*arguments, states, do, None, False)
            with pytest.raises(RuntimeError, match="saved for the backward was copied"):
                ops._backward(*arguments, states.clone(), do, None, False)


def test_kinds_are_told_apart(repeated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By everything that decides on launches."""
    q, k, v, _, state = inputs(0)
    base: dict[str, Any] = {"scale": 0.3, "tile": 32, "method": "block"}
    others: list[dict[str, Any]] = [
        {}, {"scale": 0.4}, {"tile": 16}, {"return_state": True}, {"initial_state": state}, {"method": "lightning"},
        {"precision": "high"},
    ]  # fmt: skip
    calls = [base | other for other in others]
    wanted = [leetdist.linear_attention(q, k, v, DECAY, **call) for call in calls]
    with rehearsed():
        for _ in range(CALLS):
            for call, expected in zip(calls, wanted, strict=True):
                found = leetdist.linear_attention(q, k, v, DECAY, **call)
                for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (found, expected)), strict=True):
                    assert torch.equal(x, y), call
        before = len(replay._kinds)
        monkeypatch.setenv("LEETDIST_HOPPER", "0")
        for _ in range(2):
            leetdist.linear_attention(q, k, v, DECAY, **base)
        assert len(replay._kinds) == before + 1
    assert len(repeated) == len(calls) * (CALLS - 2)


def test_which_calls_are_not_of_that_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _, _ = inputs(0)
    monkeypatch.setattr(repeats, "_on_gpu", lambda x: True)
    monkeypatch.setattr(repeats, "repeater", lambda: len)

    def wanted(*given: Any) -> bool:
        return repeats.wanted((*given, None), read=True)

    assert wanted(q, k, v, DECAY)
    assert not wanted(q, k, v, None)  # zeros are made for it
    assert not wanted(q, k, v, -DECAY)
    assert not wanted(q, k, v, DECAY * torch.nan)
    assert not wanted(q, k, v, DECAY[None, :, None].expand(1, 2, 100))  # whose values are read here
    assert not wanted(torch._neg_view(q), k, v, DECAY)
    assert not wanted(q.to_sparse(), k, v, DECAY)
    assert not wanted(q.tolist(), k, v, DECAY)
    monkeypatch.setattr(repeats.trace, "on", lambda: True)
    assert not wanted(q, k, v, DECAY)


def test_what_is_more_than_launches_is_planned_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that nobody notes, here PyTorch's: what was recorded of a call is not all of it."""
    calls = [inputs(seed)[:3] for seed in range(CALLS)]
    wanted = [leetdist.linear_attention(*call, DECAY, tile=32) for call in calls]
    monkeypatch.setattr(repeats, "_on_gpu", lambda x: True)
    monkeypatch.setattr(replay.triton_launch, "direct", lambda device: True)
    monkeypatch.setattr(replay, "_once", {})
    monkeypatch.setattr(replay, "_kinds", {})
    for call, expected in zip(calls, wanted, strict=True):
        assert torch.equal(leetdist.linear_attention(*call, DECAY, tile=32), expected)
    assert list(replay._kinds.values()) == [None]


def test_gradients_that_come_as_their_negatives() -> None:
    """A view with the sign of its values in memory turned lies as any other, and is not the same call."""

    def call(seed: int, turned: bool) -> list[Tensor]:
        q, k, v, do, dfinal = inputs(seed)
        if turned:
            do, dfinal = torch._neg_view(-do), torch._neg_view(-dfinal)
        given = (q, k, v, DECAY, None, None, 0.5, True, "block", 32, None, "", "", False, False)
        _, _, states = ops._forward(*given)
        return list(ops._backward(*given, states, do, dfinal, False)[:3])

    wanted = [call(seed, False) for seed in range(2 * CALLS)]
    with rehearsed():
        for seed, expected in enumerate(wanted):
            assert all(map(torch.equal, call(seed, seed >= CALLS), expected)), seed


def test_what_is_wrong_is_said_as_in_a_first_call() -> None:
    """Of tensors that differ from those before in their device alone, or have no sizes."""
    q, k, v, _, state = inputs(0)
    with rehearsed():
        for _ in range(CALLS):
            leetdist.linear_attention(q, k, v, DECAY, initial_state=state, tile=32)
        for _ in range(CALLS):
            with pytest.raises(ValueError, match=r"initial_state must .*meta"):
                leetdist.linear_attention(q, k, v, DECAY, initial_state=state.to("meta"), tile=32)
            with pytest.raises(ValueError, match="k must be a dense tensor with strides, got a nested one"):
                leetdist.linear_attention(q, torch.nested.as_nested_tensor([k[0]]), v, DECAY, tile=32)
