"""Ranks whose calls are not one, or that never come: all are told, in time, and of whom."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
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


def wait_in_vain(rank: int, how: str) -> tuple[float, str]:
    """One rank makes no call; seconds that the others waited, and what they were told."""
    blame.ROLL_CALL_SECONDS = 0.5
    if how == "job":
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=2))
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
def test_timeouts_are_kept(how: str) -> None:
    """The job's in the groups of a mesh, to which torch gives its own; sequence_parallel's in collective calls."""
    outcomes = run_ranks(wait_in_vain, 4 if how == "job" else 2, how, timeout_s=60)
    seconds, said = outcomes[0].value
    assert "rank 1 of 2 does not answer" in said
    assert 1.5 < seconds < 11
