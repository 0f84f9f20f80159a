"""Ranks that raise, die or are late at every stage of a call: real processes over gloo, and always an end in words."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import Outcome, run_ranks, values
from leetdist.integrations import softmax
from leetdist.operators.constant_decay import ConstantDecay
from leetdist.sequence import blame, p2p
from leetdist.sequence.group import resolve
from leetdist.testing.equality import Case, check

# Where something happens on the victim: the object and the method that is about to run.
STAGES: dict[str, tuple[Any, str]] = {
    "agreement": (p2p.PointToPoint, "alike"),
    "tile states": (ConstantDecay, "state_gradients"),
    "receive": (p2p.PointToPoint, "receive_state"),
    "fold": (ConstantDecay, "fold"),
    "send": (p2p.PointToPoint, "send_state"),
    "outputs": (ConstantDecay, "early_gradients"),
}
PLACES = [(stage, "forward") for stage in ("agreement", "receive", "fold", "send")]
PLACES += [(stage, "backward") for stage in ("tile states", "fold", "outputs")]  # no agreement there
CASE = Case(300, 16, 16, heads=2, tile=32, initial=True, decay="slow", method="block")


def before(stage: str, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    owner, name = STAGES[stage]
    real = getattr(owner, name)

    def acting(*args: Any, **kwargs: Any) -> Any:
        action()
        return real(*args, **kwargs)

    patch.setattr(owner, name, acting)


def call(group: Any, backward: Callable[[], None] = lambda: None) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    o, state = leetdist.linear_attention(q, k, v, return_state=True, group=group, method="block")
    backward()
    (o.sum() + state.sum()).backward()


def planted() -> None:
    raise MemoryError("planted")


def raise_everywhere(rank: int) -> dict[str, str]:
    """Every stage on a group of its own; the victim raises, stays alive, and the others must not wait for ever."""
    blame.ROLL_CALL_SECONDS = 0.5
    errors = {}
    for stage, direction in PLACES:
        group = dist.new_group([0, 1, 2], timeout=timedelta(seconds=1))
        call(group)
        with pytest.MonkeyPatch.context() as patch:

            def plant(patch: pytest.MonkeyPatch = patch, stage: str = stage) -> None:
                if rank == 1:
                    before(stage, planted, patch)

            try:
                if direction == "forward":
                    plant()
                    call(group)
                else:
                    call(group, plant)
            except (RuntimeError, MemoryError) as error:
                errors[f"{stage}, {direction}"] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return errors


def test_a_rank_that_raises() -> None:
    outcomes = values(run_ranks(raise_everywhere, 3, timeout_s=120))
    everything = {f"{stage}, {direction}" for stage, direction in PLACES}
    for rank, errors in enumerate(outcomes):
        # What the victim no longer owes anybody, nobody can miss: its dk and dv; and, on its right, what it hands left.
        unneeded = {0: {"outputs, backward"}, 1: set(), 2: {f"{s}, backward" for s in ("fold", "send", "outputs")}}
        needed = everything - unneeded[rank]
        assert set(errors) >= needed, f"rank {rank} did not notice {needed - set(errors)}"
        for where, error in errors.items():
            if rank == 1:
                assert error == "MemoryError: planted"
            else:
                assert "rank 1 of 3 does not answer" in error, (where, rank, error)
                assert f"Rank {rank} waited" in error
    assert "the state of heads 0 to 1 (forward scan)" in outcomes[2]["fold, forward"]
    assert "the gradient of the state of heads 0 to 1 (backward scan)" in outcomes[0]["fold, backward"]


def die(rank: int, stage: str, direction: str) -> None:
    blame.ROLL_CALL_SECONDS = 0.5
    group = dist.group.WORLD
    call(group)
    with pytest.MonkeyPatch.context() as patch:

        def plant() -> None:
            if rank == 1:
                before(stage, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)

        if direction == "forward":
            plant()
            call(group)
        else:
            call(group, plant)


@pytest.mark.parametrize(
    ("stage", "direction"), [("agreement", "forward"), ("fold", "forward"), ("receive", "backward")]
)
def test_a_rank_that_dies(stage: str, direction: str) -> None:
    outcomes = run_ranks(die, 3, stage, direction, timeout_s=5)
    assert outcomes[1] == Outcome()
    for rank in (0, 2):
        error = outcomes[rank].error
        assert error is not None, f"rank {rank} did not notice"
        assert "rank 1 of 3 does not answer" in error, error


def die_in(rank: int, function: str) -> None:
    """Where torch.distributed's own calls wait, which name nobody."""
    blame.ROLL_CALL_SECONDS = 0.5
    q, k, v = (torch.randn(1, 3, 16, 8, requires_grad=True) for _ in range(3))

    def both() -> None:
        leetdist.reduce_loss(torch.tensor(1.0), 3, dist.group.WORLD)
        softmax.softmax_attention(q, k, v, dist.group.WORLD).sum().backward()

    both()
    if rank == 1:
        setattr(dist, function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    both()


@pytest.mark.parametrize("function", ["all_reduce", "all_to_all_single"])
def test_a_rank_that_dies_in_a_collective_call(function: str) -> None:
    outcomes = run_ranks(die_in, 3, function, timeout_s=5)
    assert outcomes[1] == Outcome()
    for rank in (0, 2):
        assert "rank 1 of 3 does not answer" in (outcomes[rank].error or "nothing was raised"), outcomes[rank].error


def be_late(rank: int) -> list[str]:
    """Whoever is late, and wherever, the bits are the same."""
    found = []
    for victim in range(3):
        with pytest.MonkeyPatch.context() as patch:
            for stage in STAGES if rank == victim else ():
                before(stage, lambda: time.sleep(0.03), patch)
            found += check(CASE, resolve(dist.group.WORLD), torch.device("cpu"))
    return [str(difference) for difference in found]


def test_a_rank_that_is_late() -> None:
    assert values(run_ranks(be_late, 3)) == [[], [], []]


def companions(rank: int) -> list[list[int]]:
    """Hosts of groups that not all ranks are in: names that count a rank's groups would not fit together."""
    heard = []
    for ranks in ([0, 1], [0, 1, 2], [1, 2]):
        group = dist.new_group(ranks)
        if rank in ranks:
            transport = p2p.PointToPoint(group)
            transport.companion = p2p._companion(group)
            heard.append(transport.gather_objects(rank, "a number"))
    return heard


def test_companions_of_uneven_groups() -> None:
    everyone = [[0, 1], [0, 1, 2], [1, 2]]
    assert values(run_ranks(companions, 3)) == [everyone[:2], everyone, everyone[1:]]
