"""`mamba_chunk_scan_combined`: which arguments are refused, on which ranks, and by what name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import leetdist
from helpers import run_ranks, values

HEADS, WIDTH, GROUPS, STATE, TOKENS = 6, 16, 2, 24, 150


class Followed(TorchDispatchMode):
    """Follows operations, as torch.compile does: calls go through the custom ops."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def make(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(2, tokens, HEADS, WIDTH),
        "dt": torch.rand(2, tokens, HEADS) * 0.3,
        "A": -torch.rand(HEADS) * 4,
        "B": torch.randn(2, tokens, GROUPS, STATE),
        "C": torch.randn(2, tokens, GROUPS, STATE),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, TOKENS, HEADS)}, r"x must have shape \(B, N, H, P\)"),
        ({"dt": torch.zeros(2, TOKENS, 1)}, "dt must have shape"),
        ({"A": torch.ones(HEADS)}, "A must be finite and <= 0"),
        ({"A": -torch.ones(HEADS, WIDTH)}, "A must have shape"),
        ({"B": torch.zeros(2, TOKENS, 4, STATE)}, "B must have shape .* a divisor of 6"),
        ({"C": torch.zeros(2, TOKENS, GROUPS, 8)}, "C must have shape"),
        ({"C": torch.zeros(2, TOKENS, GROUPS, STATE).bfloat16()}, "C must have x's dtype"),
        ({"D": torch.zeros(WIDTH)}, "D must have shape"),
        ({"z": torch.zeros(2, TOKENS, HEADS, 1)}, "z must have shape"),
        ({"dt_bias": torch.zeros(1)}, "dt_bias must have shape"),
        ({"initial_states": torch.zeros(2, HEADS, STATE, WIDTH)}, "initial_states must have shape"),
        ({"seq_idx": torch.zeros(2, TOKENS)}, "seq_idx must be int32 or int64"),
        ({"seq_idx": torch.zeros(2, TOKENS, dtype=torch.int32), "cu_seqlens": torch.tensor([0, TOKENS])}, "pass one"),
        ({"initial_states": [0.0]}, "initial_states must be a tensor or None"),
        ({"cu_seqlens": 5, "initial_states": torch.zeros(2, HEADS, WIDTH, STATE)}, "cu_seqlens must be a tensor"),
        ({"dt": torch.full((2, TOKENS, HEADS), torch.nan)}, "dt must be numbers, got NaN"),
        ({"x": torch.zeros(2, TOKENS, HEADS, 0)}, "x must have no empty dimension"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit must be"),
        ({"dt_limit": 1.0}, "dt_limit must be"),
        (
            {"return_varlen_states": True},
            "return_varlen_states=True wants the documents' offsets, cu_seqlens, got None",
        ),
        ({"return_varlen_states": 1}, "return_varlen_states must be True or False"),
        ({"dt_softplus": 1}, "dt_softplus must be True or False"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    inputs = make()
    with pytest.raises(ValueError, match=message):
        leetdist.mamba_chunk_scan_combined(**inputs | change)
    if "dt_softplus" not in change:
        return

    def rank(group):  # one rank's error is all ranks'
        with pytest.raises(ValueError, match=message):
            leetdist.mamba_chunk_scan_combined(**inputs | (change if group.rank else {}), group=group, tile=16)

    leetdist.virtual_ranks(rank, 2)


def test_ranks_that_disagree_on_documents_are_told() -> None:
    def rank(group):
        inputs = {name: x.clone() for name, x in make().items()}
        told = {"seq_idx": torch.zeros(2, TOKENS, dtype=torch.int32)} if group.rank else {}
        with pytest.raises(ValueError, match="makes another call of the group"):
            leetdist.mamba_chunk_scan_combined(**inputs | told, group=group, tile=16)

    leetdist.virtual_ranks(rank, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt_softplus": True}, "dt_softplus: rank 1 has True, rank 0 has False"),
        ({"dt_limit": (0, 0.5)}, r"dt_limit: rank 1 has \(0.0, 0.5\), rank 0 has \(0.0, inf\)"),
        ({"dt_bias": torch.ones(HEADS)}, r"dt_bias: rank 1 has a number a head, rank 0 has None"),
        ({"D": torch.ones(HEADS, WIDTH)}, r"D: rank 1 has a row a head, rank 0 has None"),
        ({"z": torch.ones(2, 32, HEADS, WIDTH)}, "z: rank 1 has a tensor, rank 0 has None"),
    ],
)
@pytest.mark.parametrize("mode", [nullcontext, Followed])
def test_ranks_that_disagree_on_what_is_around_are_told(
    mode: Callable[[], Any], change: dict[str, Any], message: str
) -> None:
    inputs = make(32)

    def rank(group):
        for _ in range(2):  # what is remembered says so, too
            mine = inputs | (change if group.rank else {})
            with mode(), pytest.raises(ValueError, match=f"disagree on {message}"):
                leetdist.mamba_chunk_scan_combined(**mine, group=group, tile=16)
            with mode():
                leetdist.mamba_chunk_scan_combined(**inputs | change, group=group, tile=16)

    leetdist.virtual_ranks(rank, 2)


def compiled(rank: int) -> None:
    inputs = {name: x[:, :32] if x.ndim > 1 else x for name, x in make(32).items()}
    change: dict[str, Any] = {"dt_bias": torch.ones(HEADS), "D": torch.ones(HEADS)}

    def call_of_group(inputs: Any, softplus: bool) -> torch.Tensor:
        return leetdist.mamba_chunk_scan_combined(**inputs, dt_softplus=softplus, group=dist.group.WORLD, tile=16)

    call = torch.compile(call_of_group, fullgraph=True, backend="aot_eager")
    torch.compile(call_of_group, backend="eager")(inputs | change, True)  # a group's first use, where the graph breaks
    call(inputs | change, True)
    with pytest.raises(ValueError, match="disagree on dt_softplus: rank 1 has True, rank 0 has False"):
        call(inputs | change, rank == 1)
    with pytest.raises(ValueError, match="disagree on dt_bias: rank 1 has a number a head, rank 0 has None"):
        call(inputs | (change if rank else {"D": change["D"]}), True)


def test_ranks_that_disagree_on_what_is_around_a_compiled_call_are_told() -> None:
    values(run_ranks(compiled, 2))


def test_ranks_of_which_one_has_seq_idx_are_told() -> None:
    inputs, seq_idx = make(32), torch.zeros(2, 32, dtype=torch.int32)

    def rank(group, first, second, message):
        mine = inputs | {"seq_idx": second if group.rank else first}
        with pytest.raises(ValueError, match=message):
            leetdist.mamba_chunk_scan_combined(**mine, group=group, tile=16)

    for first, second, message in (
        (None, seq_idx, "the arguments of mamba_chunk_scan_combined with seq_idx"),
        (seq_idx, seq_idx.long(), "rank 1 has seq_idx of torch.int64, rank 0 has torch.int32"),
    ):
        leetdist.virtual_ranks(partial(rank, first=first, second=second, message=message), 2)


def test_parameters_may_have_any_floating_dtype() -> None:
    inputs = make() | {"D": torch.randn(HEADS)}
    narrow = {name: inputs[name].to(torch.float8_e5m2) for name in ("dt", "A", "D")}
    y = leetdist.mamba_chunk_scan_combined(**inputs | narrow)
    wide = {name: x.float() for name, x in narrow.items()}
    assert torch.equal(y, leetdist.mamba_chunk_scan_combined(**inputs | wide))
    with pytest.raises(ValueError, match="A must be finite and <= 0"):
        leetdist.mamba_chunk_scan_combined(**inputs | {"A": torch.ones(HEADS).to(torch.float8_e5m2)})


def test_what_is_returned() -> None:
    """Also by bools of NumPy's, and by the custom ops."""
    inputs, true = make() | {name: x[:1] for name, x in make().items() if x.ndim > 1}, np.bool_(True)
    offsets = torch.tensor([0, 5, TOKENS])
    call = leetdist.mamba_chunk_scan_combined
    assert isinstance(call(**inputs, return_final_states=np.bool_(False)), torch.Tensor)
    assert len(call(**inputs, return_final_states=true)) == 2
    assert len(call(**inputs, cu_seqlens=offsets, return_varlen_states=True)) == 2
    with Followed():
        assert len(call(**inputs, cu_seqlens=offsets, return_varlen_states=True)) == 2
    assert len(call(**inputs, cu_seqlens=offsets, return_final_states=true, return_varlen_states=true)) == 3
