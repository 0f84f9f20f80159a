"""A fold that takes what one neighbour sends, and hands its end on to the other, by itself: which folds do, and that
the scan leaves both to them. The kernel that can is leetdist.kernels.constant_decay.triton.fold's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from leetdist.operators.constant_decay import ConstantDecay
from leetdist.sequence.virtual import VirtualGroup
from leetdist.testing.equality import Case, compute, differences, make_tensors

WHAT = "a fold's own message"
CPU = torch.device("cpu")


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        (Case(520, 16, 16, heads=4, decay="slow", tile=64, uneven=True, initial=True), {"by themselves"}),
        # Each hands on first; the last receives by messages alone.
        (Case(520, 16, 16, heads=4, decay="gone", tile=64, final=False), {"by themselves", "with messages"}),
        (Case(520, 16, 16, heads=4, decay="extreme", tile=64), {"with messages"}),  # some heads are not sent
        (Case(520, 16, 16, decay="slow", tile=64, documents=(0, 100, 520)), {"by themselves", "with messages"}),
    ],
)
def test_bits_and_messages(case: Case, kinds: set[str], lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_LANES", str(lanes))
    real, ranks = ConstantDecay.fold, 3
    folds: set[str] = set()

    def hop(self: VirtualGroup, shape: tuple[int, ...], like: Tensor, source: int | None, to: int | None) -> Any:
        return self, source, to

    def fold(self: Any, keep: Tensor, states: Tensor, initial: Any, *args: Any, hop: Any = None, **more: Any) -> Any:
        folds.add("with messages" if hop is None else "by themselves")
        group, source, to = hop or (None, None, None)
        if source is not None:
            assert initial is None or not len(initial)
            shape = (states.shape[0], *states.shape[1:2], *states.shape[3:])
            initial = group.receive(states.new_empty(shape), source, WHAT)
        final = real(self, keep, states, initial, *args, **more)
        if to is None:
            return final
        group.send(final, to, WHAT)
        return None

    tensors = make_tensors(case, CPU, 0)
    single = compute(case, tensors, None)
    monkeypatch.setattr(VirtualGroup, "hop", hop)
    monkeypatch.setattr(ConstantDecay, "fold", fold)
    monkeypatch.setattr(ConstantDecay, "__init__", _between(ConstantDecay.__init__))
    ours = leetdist.virtual_ranks(lambda group: compute(case, tensors, group), ranks)
    found = [str(d) for rank in range(ranks) for d in differences(case, rank, ranks, ours[rank], single)]
    assert found == []
    assert folds == kinds


def _between(init: Any) -> Any:
    def made(self: Any, *args: Any) -> None:
        init(self, *args)
        self.folds_between = True

    return made
