"""Ranks whose calls are not one, or that never come: all are told, in time, and of whom."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
from leetdist.integrations.softmax import softmax_attention
from leetdist.sequence import blame
from leetdist.sequence.group import resolve


def test_shards_are_gathered_along_one_dimension() -> None:
    """Of a square shard the other dimensions are the same."""

    def rank(group: Any) -> None:
        with pytest.raises(ValueError, match=r"rank 1 has .* beside dim 0, rank 0 has .* beside dim 1"):
            leetdist.gather_sequence(torch.ones(3, 3), 0 if group.rank == 1 else 1, group)

    leetdist.virtual_ranks(rank, 3)


def test_a_virtual_rank_that_fails_is_told_to_who_sends() -> None:
    said = []

    def rank(group: Any) -> None:
        if group.rank == 1:
            raise KeyError("mine")
        while group.hub.failure is None:
            time.sleep(0.01)
        try:
            group.send(torch.zeros(1), 1, "a number")
        except RuntimeError as error:
            said.append(str(error))

    with pytest.raises(KeyError):
        leetdist.virtual_ranks(rank, 2)
    assert said == ["leetdist: rank 0 cannot send to rank 1: rank 1 of 2 failed: 'mine'"]


def not_a_member(rank: int) -> str:
    group = dist.new_group([0, 2])
    x = torch.randn(1, 2, 64, 16)
    try:
        leetdist.linear_attention(x, x, x, group=group)
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_that_is_in_no_such_group() -> None:
    assert values(run_ranks(not_a_member, 3)) == ["", "group does not hold this rank (global rank 1)", ""]


def wait_in_vain(rank: int, how: str, store: str) -> tuple[float, str]:
    """One rank makes no call; seconds that the others waited, and what they were told."""
    blame.ROLL_CALL_SECONDS = 0.5
    if how == "job":
        dist.barrier()  # they have started at different times
        ranks = dist.get_world_size()
        dist.destroy_process_group()
        options: Any = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=2)}
        dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    group = leetdist.device_mesh(sequence=2)["sp"] if how == "job" else dist.group.WORLD
    if how == "collective":
        resolve(group)
        with leetdist.sequence_parallel(group, timeout=2):
            dist.barrier()
    begin, said = time.monotonic(), ""
    try:
        if rank == 1:
            time.sleep(12)
        elif how == "job":
            x = torch.randn(1, 2, 64, 16)
            leetdist.linear_attention(x, x, x, group=group)
        else:
            transport: Any = resolve(group)
            with transport.collective("a sum"):
                dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        said = str(error)
    took = time.monotonic() - begin
    time.sleep(max(0.0, 13 - took))
    if how == "collective":
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout > timedelta(seconds=2)
    return took, said


@pytest.mark.parametrize("how", ["job", "collective"])
def test_timeouts_are_kept(how: str, tmp_path: Path) -> None:
    """The job's in the groups of a mesh, to which torch gives its own; sequence_parallel's in collective calls."""
    outcomes = run_ranks(wait_in_vain, 4 if how == "job" else 2, how, str(tmp_path / "store"), timeout_s=60)
    seconds, said = outcomes[0].value
    assert "rank 1 of 2 does not answer" in said
    assert 1.5 < seconds < 11


@pytest.mark.parametrize("call", ["linear_attention", "mamba"])
def test_gradients_that_come_back_from_the_grid_are_those_of_all_ranks(call: str) -> None:
    """Of packed documents the tokens are moved, tensor by tensor: a rank's gradient of k is no other's of q."""
    offsets, whole = torch.tensor([0, 50, 117, 192]), torch.randn(5, 1, 192, 2, 16)

    def attend(inputs: list[torch.Tensor], group: Any) -> None:
        x, b, c, dt, _ = inputs
        if call == "mamba":
            dt, a = dt[..., 0].sigmoid(), torch.full((2,), -1.0, requires_grad=True)
            y = leetdist.mamba_chunk_scan_combined(x, dt, a, b, c, cu_seqlens=offsets, tile=64, group=group)
        else:
            q, k, v = (y.transpose(1, 2) for y in (c, b, x))
            y = leetdist.linear_attention(q, k, v, cu_seqlens=offsets, tile=64, group=group)
        assert isinstance(y, torch.Tensor)
        y.sum().backward()

    def rank(group: Any) -> None:
        shards = [leetdist.shard_sequence(x, 1, group, tile=64).clone() for x in whole]
        odd = 1 if call == "mamba" else group.rank  # B of one rank, where A is learnt on all; another tensor of each
        shards[odd].requires_grad_(call != "mamba" or group.rank == 1)
        with pytest.raises(ValueError, match="the ranks of the group disagree on requires_grad"):
            attend(shards, group)
        attend([x.requires_grad_() for x in shards], group)

    leetdist.virtual_ranks(rank, 3)


def softmax_of(odd: bool, what: str, group: Any) -> None:
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    options: dict[str, Any] = {"scale": 2.0, "softcap": 3.0, "sinks": torch.zeros(2), "boundaries": (0, 8, 48)}
    if what == "requires_grad":
        k.requires_grad_(not odd)
    softmax_attention(q, k, v, group, **{what: options[what]} if odd and what in options else {})


def convolution_of(odd: bool, what: str, group: Any) -> None:
    documents = torch.zeros(1, 16, dtype=torch.int32 if odd else torch.int64)
    leetdist.nn.causal_conv1d(torch.zeros(1, 16, 8), torch.zeros(8, 4), seq_idx=documents, group=group)


@pytest.mark.parametrize("what", ["scale", "softcap", "sinks", "boundaries", "requires_grad", "seq_idx"])
def test_other_options_than_another_ranks(what: str) -> None:
    call = convolution_of if what == "seq_idx" else softmax_of

    def rank(group: Any) -> None:
        with pytest.raises(ValueError, match=f"rank 1 has {what}"):
            call(group.rank == 1, what, group)
        call(False, what, group)

    leetdist.virtual_ranks(rank, 3)
