"""Packed documents of `mamba_chunk_scan_combined`, and their states."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_mamba_scan import (
    DOCUMENTS,
    SHARDED,
    TOKENS,
    assert_shards,
    case_of,
    compute,
    grown,
    inputs_of,
    ours,
    recurrence,
    shard,
)

import leetdist
from leetdist.reference import relative_error


def test_documents_have_the_bits_of_each_alone() -> None:
    inputs, options, dy, dstates = case_of("documents")
    whole = compute(ours, grown(inputs), dy, dstates, **options, tile=32)
    for row, (begin, end) in enumerate(pairwise(DOCUMENTS)):
        if begin == end:
            continue
        own = {name: x[:, begin:end] if name in SHARDED else x for name, x in inputs.items()}
        own["initial_states"] = inputs["initial_states"][row : row + 1]
        alone = compute(ours, grown(own), dy[:, begin:end], dstates[row : row + 1], dt_softplus=True, tile=32)
        for key in ("y", "dx", "ddt", "dB", "dC", "dz"):
            assert torch.equal(whole[key][:, begin:end], alone[key]), key
        assert torch.equal(whole["states"][row : row + 1], alone["states"])


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_states_of_documents(ranks: int) -> None:
    """In mamba_ssm's order of what is returned, on every rank; with gradients."""
    inputs, options, dy, dstates = case_of("documents")
    options = options | {"tile": 16}
    exact = grown(inputs_of(inputs, torch.float64))
    right = compute(recurrence, exact, dy.double(), dstates.double(), **options)
    whole = compute(ours, grown(inputs), dy, dstates, **options)

    def varlen(**arguments: Any) -> Any:
        return leetdist.mamba_chunk_scan_combined(**arguments, return_varlen_states=True)

    if not ranks:
        found = compute(varlen, grown(inputs), dy, dstates, **options)
        assert all(torch.equal(x, whole[key]) for key, x in found.items())
        assert relative_error(found["states"], right["states"]) < 4e-7
        y, final, states = ours(**inputs, **options, return_varlen_states=True)
        assert torch.equal(y, whole["y"])
        assert torch.equal(final, whole["states"])
        assert torch.equal(states, whole["states"])
        return
    lengths = (TOKENS - 7 * (ranks - 1), *[7] * (ranks - 1))

    def rank(group):
        mine, my_dy, share = shard(inputs, dy, dstates, lengths, group.rank)
        return compute(varlen, mine, my_dy, share, **options, group=group)

    assert_shards(leetdist.virtual_ranks(rank, ranks), whole)


def test_states_of_documents_where_pytorch_follows() -> None:
    inputs, options, *_ = case_of("documents")

    def total(x: torch.Tensor) -> torch.Tensor:
        given = inputs | options | {"x": x}
        _, states = leetdist.mamba_chunk_scan_combined(**given, return_varlen_states=True)
        return states.square().sum()

    leaf = inputs["x"].clone().requires_grad_()
    (right,) = torch.autograd.grad(total(leaf), leaf)
    assert relative_error(torch.func.grad(total)(inputs["x"]), right) < 1e-6
