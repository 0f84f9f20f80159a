"""What is wrong on one rank is told on all of them, at once: nobody waits for a rank that has left the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.engine.call import apply_operator
from leetdist.integrations.softmax import softmax_attention
from leetdist.launch.model import Config, LanguageModel

TILE, TOKENS = 16, 32  # of each rank


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def attention(group: Any, wrong: bool, **options: Any) -> Any:
    q, k, v = (numbers(1, 2, TOKENS, 8) for _ in range(3))
    return leetdist.linear_attention(q, k[..., : 4 if wrong else 8], v, group=group, tile=TILE, **options)


def mapped(group: Any, wrong: bool) -> Any:
    """The ops' own checks come before the engine's."""
    q, k, v = (numbers(1, 2, TOKENS, 8) for _ in range(3))
    k = k[..., : 4 if wrong else 8]
    return torch.func.vmap(lambda q: leetdist.linear_attention(q, k, v, group=group, tile=TILE))(q[None])


def mapped_options(group: Any, wrong: bool) -> Any:
    x = numbers(1, 2, TOKENS, 8)
    scale: Any = "a" if wrong else 1.0
    return torch.func.vmap(lambda q: leetdist.linear_attention(q, x, x, group=group, tile=TILE, scale=scale))(x[None])


def mapped_numbers(group: Any, wrong: bool) -> Any:
    """A q that is no tensor."""
    x = numbers(1, 2, TOKENS, 8)

    def call(y: Tensor) -> Any:
        return leetdist.linear_attention(x.tolist() if wrong else y, x, y, group=group, tile=TILE)

    return torch.func.vmap(call)(x[None])


def operator_name(group: Any, wrong: bool) -> Any:
    x = numbers(1, 2, TOKENS, 8)
    name = "nothing" if wrong else "constant_decay"
    return apply_operator(name, x, x, x, {"log_decay": torch.tensor([-0.1, -0.2])}, group=group, tile=TILE)


def operator_gates(group: Any, wrong: bool) -> Any:
    x, gates = numbers(1, 2, TOKENS, 8), {"log_decay": torch.tensor([-0.1, -0.2])}
    return apply_operator("constant_decay", x, x, x, {} if wrong else gates, group=group, tile=TILE)


def no_gates(group: Any, wrong: bool) -> Any:
    x, gates = numbers(1, 2, TOKENS, 8), {"log_decay": torch.tensor([-0.1, -0.2])}
    return apply_operator("constant_decay", x, x, x, None if wrong else gates, group=group, tile=TILE)  # type: ignore[arg-type]


def gathered_gradient(group: Any, wrong: bool) -> Any:
    return leetdist.gather_sequence(numbers(2, TOKENS).requires_grad_(wrong), 1, group)


def gathered_mode(group: Any, wrong: bool) -> Any:
    with torch.set_grad_enabled(not wrong):
        return leetdist.gather_sequence(numbers(2, TOKENS).requires_grad_(), 1, group)


def softmax(group: Any, wrong: bool) -> Any:
    q, k, v = (numbers(2 if wrong else 1, 2, TOKENS, 8) for _ in range(3))
    return softmax_attention(q, k, v, group)


def softmax_gradient(group: Any, wrong: bool) -> Any:
    q, k, v = (numbers(1, 2, TOKENS, 8).requires_grad_(wrong) for _ in range(3))
    return softmax_attention(q, k, v, group)


def batch(group: Any, wrong: bool) -> Any:
    tokens = torch.arange(2 * TOKENS)[None]
    return leetdist.shard_batch({"input_ids": tokens, "labels": tokens[:, : 3 if wrong else None]}, group)


def batch_of_lists(group: Any, wrong: bool) -> Any:
    tokens = torch.arange(2 * TOKENS)[None]
    return leetdist.shard_batch({"input_ids": tokens, "labels": tokens.tolist() if wrong else tokens}, group)


def session(group: Any) -> leetdist.Session:
    return leetdist.Session(LanguageModel(Config(dim=32, layers=1, heads=2, hidden=64)), group)


def prompt(group: Any, wrong: bool) -> Any:
    tokens = torch.arange(2 * TOKENS)[None]
    return session(group).prefill(tokens[0] if wrong else tokens)


def another_prompt(group: Any, wrong: bool) -> Any:
    return session(group).prefill(torch.arange(2 * TOKENS)[None] + wrong)


def longer_prompt(group: Any, wrong: bool) -> Any:
    return session(group).prefill(torch.arange(2 * TOKENS + wrong)[None])


CALLS = {
    attention: "Dk", mapped: "Dk", mapped_options: "scale must be",
    mapped_numbers: "q must be a tensor", operator_name: "operator must be one of",
    operator_gates: "gates of operator", no_gates: "gates of operator",
    gathered_gradient: "requires_grad", gathered_mode: "requires_grad", softmax: "heads and their sizes",
    softmax_gradient: "requires_grad", batch: "labels must have the shape",
    batch_of_lists: "labels must have the shape",
    prompt: "tokens must be an int64 tensor", another_prompt: "tokens must be the same",
    longer_prompt: "tokens must be the same",
}  # fmt: skip


def told(call: Callable[[Any, bool], Any], group: Any, rank: int) -> tuple[str, str]:
    """The kind of error of a call that is wrong on rank 1, and its words; the group is of use after it."""
    try:
        call(group, rank == 1)
    except ValueError as error:
        call(group, False)
        return "ValueError", str(error)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_all_ranks(call: Callable[[Any, bool], Any]) -> None:
    """A rank that is not told ends with a RuntimeError: the other has returned."""
    leetdist.virtual_ranks(lambda group: call(group, False), 2)
    for kind, words in leetdist.virtual_ranks(lambda group: told(call, group, group.rank), 2):
        assert kind == "ValueError", words
        assert CALLS[call] in words


def linear(x: Tensor, group: Any) -> Any:
    return leetdist.linear_attention(x, x[..., :4], x, group=group)


def operator(x: Tensor, group: Any) -> Any:
    return apply_operator("constant_decay", x, x, x, {}, group=group)


def scan(x: Tensor, group: Any) -> Any:
    return leetdist.mamba_chunk_scan_combined(x, x, x, x, x, group=group)


@pytest.mark.parametrize("call", [linear, operator, scan])
def test_a_call_without_numbers_is_one_ranks_own(call: Callable[[Tensor, Any], Any]) -> None:
    """What is wrong with it the others are not told of, which are not in the call."""

    def rank(group: Any) -> None:
        if group.rank == 0:
            with pytest.raises(ValueError, match=r"k must have|gates of operator|dt must have"):
                call(torch.empty(1, 2, TOKENS, 8, device="meta"), group)
        attention(group, False)

    leetdist.virtual_ranks(rank, 2)


# Which of a compiled call's arguments need a gradient, on rank 0 and on rank 1.
LEARNT = {
    "q on one": ("q", ""), "log_decay on the other": ("", "log_decay"), "the initial state alone": ("initial_state", "")
}  # fmt: skip


def compiled(rank: int, ranks: int) -> dict[str, str]:
    torch.set_num_threads(1)
    found = {}
    for name, learnt in {**LEARNT, "all is well": ("q initial_state", "q")}.items():
        given = {name: numbers(1, 2, TOKENS, 8) for name in "qkv"} | {"log_decay": torch.tensor([-0.1, -0.2])}
        if rank == 0:
            given["initial_state"] = numbers(1, 2, 8, 8)
        for argument in learnt[rank].split():
            given[argument].requires_grad_()
        torch._dynamo.reset()
        call = torch.compile(leetdist.linear_attention, backend="aot_eager", fullgraph=True)
        try:
            call(**given, group=torch.distributed.group.WORLD, tile=TILE).sum().backward()
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_who_learns_in_a_compiled_call() -> None:
    """The graphs of ranks that record nothing have no backward pass, for which the others would wait."""
    for found in values(run_ranks(compiled, 2, 2)):
        assert "disagree on traced_grad: rank 1 has False, rank 0 has True" in found["q on one"]
        assert "disagree on traced_grad: rank 1 has True, rank 0 has False" in found["log_decay on the other"]
        assert "initial_state needs a gradient, so q, k, v or log_decay must" in found["the initial state alone"]
        assert found["all is well"] == "nothing was raised"
