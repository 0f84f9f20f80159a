"""Whole sequences of short tiles go to whoever computes them without states in memory, where that is right; a stand-in
in PyTorch does so by the three steps."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from helpers import forget_kernels
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block
from leetdist.kernels.runtime.settings import Settings
from leetdist.operators import dispatch, refusals
from leetdist.operators.choice import Use
from leetdist.operators.facts import Facts, Machine
from leetdist.operators.implementations import CANDIDATES, CUDA_HOPPER_ROWS, PYTORCH, Implementation

MODULE = "leetdist.kernels.constant_decay.stand_in"
TILE = 32


def row_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    transposed: bool,
    sum_scale: float,
    **options: Any,
) -> Tensor:
    given = (c, b) if transposed else (b, c)
    states = block.tile_states(*given, log_decay, tiles, reverse=reverse, scale=sum_scale)
    block.fold(states, None, log_decay, tiles, reverse=reverse)
    states = states.mT if transposed else states
    return block.tile_outputs(a, b, c, states, log_decay, tiles, reverse=reverse, out_dtype=a.dtype, **options)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, bool]]]:
    """The directions in which the stand-in was asked, and whether for transposed states."""
    heard: list[tuple[bool, bool]] = []

    def noted(*given: Any, **options: Any) -> Tensor:
        heard.append((options["reverse"], options["transposed"]))
        return row_outputs(*given, **options)

    def refusal(facts: Facts) -> str | None:
        machine = facts.machine
        with monkeypatch.context() as patch:
            patch.setattr(refusals, "cuda_hopper", lambda facts: None)
            return refusals.cuda_hopper_rows(facts) or (None if machine.device == "cpu" else "a CPU")

    module = types.ModuleType(MODULE)
    module.row_outputs = noted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setitem(CANDIDATES, "row_outputs", (Implementation("stand-in", "stand_in", refusal),))
    monkeypatch.setattr(dispatch, "CUDA_HOPPER", PYTORCH)
    forget_kernels()
    yield heard
    forget_kernels()


def drawn(batch: int, *heads: int) -> list[Tensor]:
    return [torch.randn(batch, own, 100, 8) for own in heads]


def gradients(given: list[Tensor], log_decay: Tensor, **options: Any) -> list[Tensor]:
    *leaves, do = given
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = leetdist.linear_attention(*leaves, log_decay, tile=TILE, scale=0.3, method="block", **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("documents", [None, (0, 20, 20, 100)])
def test_outputs_and_gradients(walked, documents, monkeypatch):
    batch = 3 if documents is None else 1
    given, log_decay = drawn(batch, 2, 2, 2, 2), -torch.rand(2)
    options = {} if documents is None else {"cu_seqlens": torch.tensor(documents)}
    found = gradients(given, log_decay, **options)
    assert walked == [(False, False), (False, True), (True, True), (True, False)]
    if documents is None:
        text = leetdist.explain(*given[:3], log_decay, tile=TILE, method="block")
        assert "outputs of whole sequences by stand-in" in text
    monkeypatch.setitem(CANDIDATES, "row_outputs", ())
    forget_kernels()
    plain = gradients(given, log_decay, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))
    assert len(walked) == 4
    for begin, end in pairwise(documents or ()):
        if begin < end:
            own = [x[:, :, begin:end] for x in given]
            assert torch.equal(gradients(own, log_decay)[0], found[0][:, :, begin:end])


def test_nothing_is_kept_between_the_passes(walked):
    given = [x.requires_grad_() for x in drawn(2, 2, 2, 2)]
    o = leetdist.linear_attention(*given, -torch.rand(2), tile=TILE, method="block")
    saved = [x for x in o.grad_fn.saved_tensors if x is not None]  # type: ignore[union-attr]
    assert {x.numel() for x in saved} <= {given[0].numel(), 2}


@pytest.mark.parametrize(
    "case", ["state", "initial", "learnt", "shared", "long", "tile", "unlike", "group", "compiled"]
)
def test_who_needs_states_has_them(walked, case):
    given, log_decay, options = drawn(1, 2, 2, 2), -torch.rand(2), {"tile": TILE, "method": "block"}
    if case == "state":
        leetdist.linear_attention(*given, log_decay, return_state=True, **options)
    elif case == "initial":
        leetdist.linear_attention(*given, log_decay, initial_state=torch.randn(1, 2, 8, 8), **options)
    elif case == "learnt":
        log_decay.requires_grad_()
        leetdist.linear_attention(*given, log_decay, **options).sum().backward()
        assert log_decay.grad is not None
    elif case == "shared":
        leetdist.linear_attention(given[0], *(x[:, :1] for x in given[1:]), log_decay, **options)
        assert not walked
        with torch.no_grad():
            leetdist.linear_attention(given[0], *(x[:, :1] for x in given[1:]), log_decay, **options)
        assert walked.pop() == (False, False)
    elif case == "long":
        leetdist.linear_attention(*(torch.randn(1, 2, 16 * 9, 8) for _ in given), log_decay, tile=16, method="block")
        assert not walked
        leetdist.linear_attention(*(torch.randn(128, 2, 16 * 9, 8) for _ in given), log_decay, tile=16, method="block")
        assert walked.pop() == (False, False)
    elif case == "tile":
        given = [torch.randn(1, 2, 130, 128) for _ in given]
        leetdist.linear_attention(*given, log_decay, tile=128, method="block")
        assert not walked
        leetdist.linear_attention(*(x.expand(132, -1, -1, -1) for x in given), log_decay, tile=128, method="block")
        assert walked.pop() == (False, False)
    elif case == "unlike":  # a long document among short ones, which would be walked by few
        documents = torch.tensor([*range(0, 4096, 32), 5000])
        given = [torch.randn(1, 2, 5000, 8) for _ in given]
        leetdist.linear_attention(*given, log_decay, cu_seqlens=documents, **options)
    elif case == "group":
        given = [x[:, :, :96] for x in given]
        leetdist.virtual_ranks(lambda group: leetdist.linear_attention(*given, log_decay, group=group, **options), 2)
    else:
        leaves = [x.requires_grad_() for x in given]
        torch.compile(lambda *x: leetdist.linear_attention(*x, log_decay, **options), backend="aot_eager")(*leaves)
    assert not walked


def test_why_nobody_does(walked):
    given, log_decay = drawn(1, 2, 2, 2), -torch.rand(2)
    text = leetdist.explain(*given, log_decay, tile=TILE, method="block", return_state=True)
    assert "stand-in (stand_in): sequences without a group" in text
    assert "stand-in" not in leetdist.explain(*given, log_decay, tile=128, method="block")


def test_on_hopper() -> None:
    machine = Machine("cuda", (9, 0), "2.13.0", "3.6.0", None, None, (13, 0))

    def facts(tile: int, rows: int, columns: int, **more: Any) -> Facts:
        return Facts(machine, Settings(None, True, False), torch.bfloat16, rows, columns, tile, **more)

    use, whole = Use("row_outputs"), {"outputs_alone": True, "sequences": (32, 8)}
    walked = [(tile, whole) for tile in (16, 32, 64)]
    many = {"outputs_alone": True, "sequences": (1056, 4)}
    walked += [(256, many), (1024, many), (256, many | {"both_passes": True})]
    for tile, more in walked:
        choice, _ = dispatch.ask(use, facts(tile, 128, 128, **more))
        assert choice is not None
        assert choice.implementation is CUDA_HOPPER_ROWS
    for given, reason in (
        (facts(128, 128, 128, **whole), "that it is faster, got 32 and 128"),
        (facts(2048, 128, 128, **many), "that it is faster, got 1056 and 2048"),
        (facts(1024, 128, 128, **many, both_passes=True), "that it is faster, got 1056 and 1024"),
        (facts(64, 64, 64, sequences=(32, 8)), "without a group"),
        (facts(64, 64, 64, outputs_alone=True, sequences=(32, 9)), "got 32 and 9"),
        (facts(64, 64, 256, **whole), "up to 128, got 64 and 256"),
        (facts(64, 64, 100, **whole), "multiple of 8"),
    ):
        choice, refused = dispatch.ask(use, given)
        assert choice is None
        assert reason in refused[0][1]
