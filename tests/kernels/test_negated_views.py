"""A view can stand for the negatives of what lies in memory, as `x.conj().imag` does; kernels read memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import leetdist

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.interpreter]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Given = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")


def draw(**shapes: tuple[int, ...]) -> Given:
    return {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}


def negated(x: torch.Tensor) -> torch.Tensor:
    """The same numbers."""
    return torch._neg_view(-x)


def scan(**given: Any) -> tuple[torch.Tensor, ...]:
    return leetdist.mamba_chunk_scan_combined(**given, dt_softplus=True, return_final_states=True, tile=16)


def convolution(**given: Any) -> tuple[torch.Tensor, ...]:
    return leetdist.nn.causal_conv1d(**given, activation="silu", return_state=True)


def step(**given: Any) -> tuple[torch.Tensor, ...]:
    return leetdist.linear_attention_step(**given)


def steps(**given: Any) -> tuple[torch.Tensor, ...]:
    given["states"] = given["states"].clone()
    return leetdist.linear_attention_steps(**given), given["states"]


TOKENS = {name: (1, 2, 3, 16) for name in "qkv"}
TOKEN = {name: (1, 2, 1, 16) for name in "qkv"}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {
    "scan": (
        scan,
        {
            "x": (1, 5, 2, 16), "dt": (1, 5, 2), "A": (2,), "B": (1, 5, 1, 16), "C": (1, 5, 1, 16), "D": (2,),
            "z": (1, 5, 2, 16), "dt_bias": (2,), "initial_states": (1, 2, 16, 16),
        },
    ),
    "convolution": (convolution, {"x": (1, 5, 3), "weight": (3, 2), "bias": (3,), "initial": (1, 1, 3)}),
    "step": (step, {**TOKEN, "state": (1, 2, 16, 16), "log_decay": (1, 2, 1)}),
    "steps": (steps, {**TOKENS, "states": (1, 2, 16, 16), "log_decay": (1, 2, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_the_numbers_that_views_stand_for(name: str) -> None:
    call, shapes = CALLS[name]
    given = draw(**shapes)
    for decay in ("A", "log_decay"):
        if decay in given:
            given[decay] = -given[decay].abs()
    right = call(**given)
    for changed in given.keys() - {"states"}:
        found = call(**given | {changed: negated(given[changed])})
        assert all(map(torch.equal, found, right)), changed


@pytest.mark.parametrize("name", ["scan", "convolution"])
def test_gradients_that_flow_in_are(name: str) -> None:
    call, shapes = CALLS[name]
    given = draw(**shapes)
    given = {key: (-x.abs() if key == "A" else x).requires_grad_() for key, x in given.items()}
    results = call(**given)
    flowing = [torch.randn_like(x) for x in results]
    right, found = (
        torch.autograd.grad(results, tuple(given.values()), flows, retain_graph=True)
        for flows in (flowing, [negated(x) for x in flowing])
    )
    assert all(map(torch.equal, found, right))


def test_states_that_are_changed_in_place_must_be_in_memory() -> None:
    given = draw(**TOKEN)
    state = negated(torch.zeros(1, 2, 16, 16, device=DEVICE))
    with pytest.raises(ValueError, match="state is changed in place, so it must not be a view of negated values"):
        leetdist.linear_attention_step(**given, state=state, inplace=True)
    with pytest.raises(ValueError, match="states is changed in place, so it must not be a view of negated values"):
        leetdist.linear_attention_steps(**given, states=state)
