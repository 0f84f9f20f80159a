"""Passes of a group whose states hosts pass on are recorded and repeated too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rehearsal import rehearsed, replay
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.sequence.group import resolve
from leetdist.sequence.p2p import PointToPoint
from leetdist.sequence.virtual import VirtualGroup
from nccl_standin import nccl_by_gloo

CALLS = 4  # the second is recorded


def results(group: Any, decay: Tensor, seed: int, **options: Any) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    whole = [torch.randn(1, 2, 192, 16, generator=draw) for _ in range(4)]
    q, k, v, do = (leetdist.shard_sequence(x, 2, group, tile=32) for x in whole)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = leetdist.linear_attention(*leaves, decay, group=group, tile=32, method="block", **options)
    grads = torch.autograd.grad(o, [*leaves, decay] if decay.requires_grad else leaves, do)
    return [o.detach(), *grads]


def learnt(values: list[float]) -> Tensor:
    return torch.tensor(values, requires_grad=True)


DECAYS = {
    "slow": torch.tensor([-0.01, -0.1]),
    "one forgets": torch.tensor([-0.1, -4.0]),
    "learnt": learnt([-0.1, -4.0]),
}


def repeated(group: Any) -> list[str]:
    """What differs from one device, call by call."""
    found = []
    for name, decay in DECAYS.items():
        for call in range(CALLS):
            ours, one = results(group, decay, call), results(None, decay, call)
            for number, (x, y) in enumerate(zip(ours, one, strict=True)):
                if y.ndim == 1:  # of log_decay: the sum over the ranks
                    same = torch.equal(x, y if group.rank == 0 else torch.zeros_like(y))
                else:
                    same = torch.equal(x, leetdist.shard_sequence(y, 2, group, tile=32))
                if not same:
                    found.append(f"{name}: call {call}, result {number}")
    return found


def count(patch: pytest.MonkeyPatch) -> list[int]:
    """How many times launches were repeated under a group, and how many messages passed on by that."""
    counted = [0, 0]
    real, message = replay.Replay.__call__, replay.Message

    def called(self: Any, *args: Any) -> Any:
        passed = sum(isinstance(action, message) for action in self.actions)
        counted[0] += passed > 0
        counted[1] += passed
        return real(self, *args)

    patch.setattr(replay.Replay, "__call__", called)
    return counted


@pytest.mark.real_empty
def test_virtual_ranks_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualGroup, "place", lambda self: ())
    counted = count(monkeypatch)
    with rehearsed():
        assert leetdist.virtual_ranks(repeated, 3) == [[]] * 3
    passes = 3 * 2 * (CALLS - 2) * len(DECAYS)
    # Two messages leave, and come, a pass; and for the gradient of the decay that is learnt.
    assert counted == [passes, 4 * (CALLS - 2) * (2 * len(DECAYS) + 1)]


@pytest.mark.real_empty
def test_lanes_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a part of its call's tensors, also one whose heads all forget, which puts what comes into its tile."""
    monkeypatch.setattr(VirtualGroup, "place", lambda self: ())
    monkeypatch.setenv("LEETDIST_LANES", "2")
    counted = count(monkeypatch)
    with rehearsed():
        assert leetdist.virtual_ranks(repeated, 3) == [[]] * 3
    passes = 2 * len(DECAYS) - 1  # one joins its lanes' gradients of a decay by a copy, and is not repeated
    assert counted[0] == 3 * (CALLS - 2) * passes


def over_a_group() -> int:
    """How many kinds of calls over a group are known."""
    return sum(any(getattr(x, "transport", None) for x in kind) for kind in (*replay._once, *replay._kinds))


def over_gloo(rank: int) -> tuple[list[str], list[int], list[int]]:
    transport = resolve(dist.group.WORLD)
    assert isinstance(transport, PointToPoint)
    transport.staged = False  # as NCCL, which is given its tensors where they are
    with pytest.MonkeyPatch.context() as patch, rehearsed():
        patch.setattr(transport, "capturing", lambda: False)
        counted = count(patch)
        found, known = repeated(transport), over_a_group()
        transport.close()
        return found, counted, [known, over_a_group()]


def over_nccl(rank: int) -> tuple[list[str], list[int], list[str], int]:
    """By NCCL's own calls, which are repeated as launches are; whole states go in exchanges, which are not."""
    transport = PointToPoint(dist.group.WORLD)
    initial = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with nccl_by_gloo(transport) as symbols, pytest.MonkeyPatch.context() as patch, rehearsed():
        counted, steps = count(patch), count_library_steps(patch)
        found = repeated(transport)
        for call in range(CALLS):
            ours = results(transport, DECAYS["slow"], call, initial_state=None if rank else initial)
            one = results(None, DECAYS["slow"], call, initial_state=initial)
            for x, y in zip(ours, one, strict=True):
                if not torch.equal(x, leetdist.shard_sequence(y, 2, transport, tile=32)):
                    found.append(f"initial state: call {call}")
        transport.close()
        return found, counted, symbols.names(), steps[0]


def count_library_steps(patch: pytest.MonkeyPatch) -> list[int]:
    from leetdist.kernels.runtime.repeated_launch import LibraryStep

    counted, real = [0], LibraryStep.__call__

    def called(self: Any, *args: Any) -> None:
        counted[0] += 1
        real(self, *args)

    patch.setattr(LibraryStep, "__call__", called)
    return counted


def test_nccl_repeats() -> None:
    """A message that comes into a tile by a copy, where heads forget, is a step before one with its tensor."""
    passes = (CALLS - 2) * (2 * len(DECAYS) + 1)  # one of them for the gradient of the decay that is learnt
    for found, counted, names, steps in values(run_ranks(over_nccl, 2)):
        assert found == []
        assert steps >= passes
        assert names.count("Send") + names.count("Recv") > steps
        assert counted[1] < passes


def test_processes_repeat() -> None:
    """And when the group ends, nothing of it is kept."""
    for found, counted, known in values(run_ranks(over_gloo, 2)):
        assert found == []
        assert known == [2 * 2 * len(DECAYS), 0]
        assert counted == [2 * (CALLS - 2) * len(DECAYS), (CALLS - 2) * (2 * len(DECAYS) + 1)]
