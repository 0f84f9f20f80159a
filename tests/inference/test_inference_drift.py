"""Decoding for a long time: the state after any number of tokens is as near to fp64 as fp32 can keep it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import leetdist
from leetdist.reference import recurrence, relative_error

TOKENS, TOGETHER = 32_768, 512
# Of each, exp in fp32 is off by up to 6e-8, always to one side: together 2e-3 over these tokens.
LOG_DECAYS = [0.0, -1e-7, -1e-6, -1e-5, -3e-5, -1e-4, -1e-3, -0.5, -0.8, -30.0, -math.inf]


def decoded(tensors: tuple[Tensor, ...], state: Tensor, log_decay: Tensor) -> Tensor:
    for t in range(0, TOKENS, TOGETHER):
        leetdist.linear_attention_steps(*(x[:, :, t : t + TOGETHER] for x in tensors), state, log_decay)
    return state


def test_the_error_of_a_state_does_not_grow_with_the_tokens() -> None:
    log_decay, heads = torch.tensor(LOG_DECAYS), len(LOG_DECAYS)
    q, k, v = (torch.randn(1, heads, TOKENS, 4) for _ in range(3))
    initial = torch.randn(1, heads, 4, 4)
    powers = torch.exp(log_decay.double()[:, None] * torch.arange(TOKENS - 1, -1, -1))
    powers[:, -1] = 1  # -inf * 0
    expected = torch.einsum("bhnd,hn,bhne->bhde", k.double(), powers, v.double())
    expected += torch.exp(log_decay.double() * TOKENS)[:, None, None] * initial
    state = decoded((q, k, v), initial.clone(), log_decay)
    for head, value in enumerate(LOG_DECAYS):
        assert relative_error(state[:, head], expected[:, head]) < 6e-6, value


def test_a_state_to_which_nothing_is_added_fades_at_its_rate() -> None:
    log_decay = torch.tensor([-1e-5, -3e-5, -1e-4, -1e-3])
    nothing = torch.zeros(1, 4, TOKENS, 4)
    initial = torch.randn(1, 4, 4, 4)
    state = decoded((nothing, nothing, nothing), initial.clone(), log_decay)
    expected = torch.exp(log_decay.double() * TOKENS)[:, None, None] * initial
    for head in range(4):
        assert relative_error(state[:, head], expected[:, head]) < 1e-5


@pytest.mark.parametrize("log_decay_dtype", [torch.float32, torch.float64])
def test_fp64_is_as_exact_as_fp64(log_decay_dtype: torch.dtype) -> None:
    """A log decay in fp32 is exponentiated in fp64."""
    log_decay = torch.tensor([-1e-5, -1e-3, -0.69, -0.71, -9.0], dtype=log_decay_dtype)
    q, k, v = (torch.randn(1, 5, 2000, 4, dtype=torch.float64) for _ in range(3))
    states = torch.zeros(1, 5, 4, 4, dtype=torch.float64)
    o = leetdist.linear_attention_steps(q, k, v, states, log_decay)
    expected, last = recurrence(q, k, v, log_decay)  # which rounds gamma to fp64, at each of 2,000 tokens
    assert relative_error(o, expected) < 1e-13
    assert relative_error(states, last) < 1e-13
    state = torch.zeros_like(states)
    for t in range(100):
        _, state = leetdist.linear_attention_step(*(x[:, :, t : t + 1] for x in (q, k, v)), state, log_decay)
    assert relative_error(state, recurrence(q[:, :, :100], k[:, :, :100], v[:, :, :100], log_decay)[1]) < 1e-14


@pytest.mark.gpu
@pytest.mark.interpreter
def test_triton_forgets_at_the_same_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, wide, last = (TOKENS, 64, 64) if device == "cuda" else (300, 16, 64)
    log_decay = torch.tensor([[-1e-5, 0], [-1e-3, 0], [-0.8, 0], [-math.inf, 0]], device=device)[:, 0]
    q, k, v = (torch.randn(1, 4, tokens, wide, device=device) for _ in range(3))
    initial = torch.randn(1, 4, wide, wide, device=device)
    # The state before the last tokens in one sum, in fp64; from there token by token.
    before = tokens - last
    left = torch.arange(before, -1, -1, device=device)
    powers = torch.where(left > 0, torch.exp(log_decay.double()[:, None] * left.clamp_min(1)), 1.0)
    weighted = k[:, :, :before].double() * powers[:, 1:, None]
    state = weighted.mT @ v[:, :, :before].double() + powers[:, 0, None, None] * initial.double()
    ends = (x[:, :, before:].cpu() for x in (q, k, v))
    expected, end = recurrence(*ends, log_decay.cpu(), initial_state=state.cpu())
    for decay in (log_decay, log_decay.double()):
        states = initial.clone()
        o = leetdist.linear_attention_steps(q, k, v, states, decay)[:, :, before:].cpu()
        for head in range(4):
            assert relative_error(o[:, head], expected[:, head]) < 5e-6
            assert relative_error(states[:, head].cpu(), end[:, head]) < 5e-6
