"""Scans on one device that are found by how their tensors lie: what they compute, and which are not of that kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mamba_scan import CASES, case_of, compute, grown, ours
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import leetdist
from helpers import forget_kernels
from leetdist.engine import filling
from leetdist.engine import repeats as of_attention
from leetdist.kernels.token_decay.pytorch import block
from leetdist.mamba import passes, repeats
from leetdist.operators import token_decay

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
rehearsal = pytest.importorskip("rehearsal")

pytestmark = pytest.mark.real_empty
CALLS = 4  # the second is recorded
WITHOUT_OFFSETS = [name for name in CASES if name != "documents"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scans take the short way, and are called there."""
    monkeypatch.setattr(of_attention, "_on_gpu", lambda x: True)
    yield
    repeats.checked.clear()


@contextmanager
def rehearsed() -> Iterator[None]:
    """All that a scan runs is launched."""
    with pytest.MonkeyPatch.context() as patch, rehearsal.rehearsed(token_decay.TokenDecay):
        patch.setattr(block, "weighted_values", rehearsal.a_launch(block.weighted_values))
        for module in (passes, repeats, token_decay):
            patch.setattr(module, "kernel", lambda step, *_: rehearsal.a_launch(step))
        patch.setattr(filling, "sum_shared", rehearsal.a_launch(filling.sum_shared))
        forget_kernels()
        try:
            yield
        finally:
            forget_kernels()


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of calls that were repeated, one after the other."""
    found: list[str] = []
    real = rehearsal.replay.Replay.__call__

    def called(self: Any, *args: Any) -> Any:
        (kind,) = (kind for kind, known in rehearsal.replay._kinds.items() if known is self)
        found.append(kind[0].__name__)
        return real(self, *args)

    monkeypatch.setattr(rehearsal.replay.Replay, "__call__", called)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITHOUT_OFFSETS)
def test_bits_of_the_long_way(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Whatever is learnt."""
    inputs, options, dy, dstates = case_of(name, dtype)
    learnt = [tuple(inputs), ("x",), ("dt",), ("B", "C"), *((key,) for key in inputs if key in ("D", "z"))]

    def call(names: tuple[str, ...]) -> dict[str, Tensor]:
        given = {key: x.detach().requires_grad_(key in names and x.is_floating_point()) for key, x in inputs.items()}
        y, states = ours(**given, **options)
        outs = [(y, dy), (states, dstates)]
        torch.autograd.backward(*zip(*[(o, grad.to(o.dtype)) for o, grad in outs if o.requires_grad], strict=True))
        return {"y": y.detach(), "states": states.detach(), **{key: given[key].grad for key in names}}

    wanted = [call(names) for names in learnt]
    request.getfixturevalue("short")
    for names, right in zip(learnt, wanted, strict=True):
        found = call(names)
        assert found.keys() == right.keys()
        for key, x in found.items():
            assert x is right[key] is None or torch.equal(x, right[key]), (names, key)
    assert repeats.checked


def as_given(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return case_of(name)


@pytest.mark.parametrize("name", WITHOUT_OFFSETS)
def test_a_scan_is_one_call_to_the_host(name: str, repeated: list[str]) -> None:
    """Its launches around the attention and in it; a gate that is learnt is one of its own."""

    def call(seed: int) -> list[dict[str, Tensor]]:
        inputs, options, dy, dstates = as_given(name, seed)
        with torch.no_grad():
            y, states = ours(**inputs, **options)
        return [{"y": y, "states": states}, compute(ours, grown(inputs), dy, dstates, **options)]

    wanted = [call(seed) for seed in range(CALLS)]
    with rehearsed():
        for seed in range(CALLS):
            for found, right in zip(call(seed), wanted[seed], strict=True):
                for key, x in found.items():
                    assert torch.equal(x, right[key]), key
    gate = "z" in CASES[name][0]
    learning = ["_forward", "_gated", "_gate_gradients", "_backward"] if gate else ["_forward", "_backward"]
    assert repeated == ["_outputs", *learning] * (CALLS - 2)


def test_kinds_are_told_apart(repeated: list[str]) -> None:
    """By everything that decides on launches, and nothing that is wrong passes for what was right."""
    inputs, *_ = case_of("as Mamba-2's layer")
    others: list[dict[str, Any]] = [
        {}, {"dt_softplus": True}, {"dt_limit": (0.1, 0.2)}, {"tile": 16}, {"initial_states": None}, {"D": None},
        {"return_final_states": True}, {"x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)},
    ]  # fmt: skip
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dt_softplus": 1}, "dt_softplus must be True or False"),
        ({"tile": True}, "tile"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"D": torch.zeros(3)}, "D must have shape"),
        ({"return_varlen_states": True}, "cu_seqlens"),
    ]

    def call(**more: Any) -> list[Tensor]:
        found = leetdist.mamba_chunk_scan_combined(**inputs | {"tile": 32} | more)
        return list(found) if isinstance(found, tuple) else [found]

    wanted = [call(**more) for more in others]
    with rehearsed():
        for _ in range(CALLS):
            for more, right in zip(others, wanted, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(call(**more), right, strict=True)), more
            for more, message in wrong:
                with pytest.raises(ValueError, match=message):
                    call(**more)
    # (The first call of a kind may have the attention of another.)
    assert repeated.count("_outputs") == len(others) * (CALLS - 2)


def test_negated_gradients() -> None:
    """They lie as others do, and their memory says the opposite."""
    inputs, _, dy, _ = case_of("skip and gate")
    for names in (("D",), ("D", "z")):
        given = {key: x for key, x in inputs.items() if key not in ("D", "z") or key in names}

        def call(dy: Tensor, given: Any = given) -> Any:
            leaves = grown(given)
            return torch.autograd.grad(leetdist.mamba_chunk_scan_combined(**leaves), list(leaves.values()), dy)

        with rehearsed():
            for _ in range(CALLS):
                for found, wanted in zip(call(torch._neg_view(dy)), call(-dy), strict=True):
                    assert torch.equal(found, wanted)


def test_outputs_of_the_gate_are_let_go(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """o, as large as x, is kept for z's gradient alone: the other gradients are made without it."""
    inputs, options, dy, _ = case_of("skip and gate")
    held: list[StorageWeakRef] = []
    kernel, gradients = repeats.kernel, repeats.gradients_by_token

    def taken(step: Any, *of: Any) -> Any:
        def scan_outputs(o: Tensor, *given: Any) -> Tensor:
            held.append(StorageWeakRef(o.untyped_storage()))
            return kernel(step, *of)(o, *given)

        return scan_outputs if step is repeats.scan.scan_outputs else kernel(step, *of)

    def late(*given: Any, **more: Any) -> Any:
        assert [ref.expired() for ref in held] == [True]
        return gradients(*given, **more)

    monkeypatch.setattr(repeats, "kernel", taken)
    monkeypatch.setattr(repeats, "gradients_by_token", late)
    leaves = grown(inputs)
    y = leetdist.mamba_chunk_scan_combined(**leaves, **options)
    assert [ref.expired() for ref in held] == [False]
    torch.autograd.grad(y, list(leaves.values()), dy)


def test_is_differentiated_once(short: None) -> None:
    for names in ((), ("z",)):
        inputs = {key: x for key, x in case_of("skip and gate")[0].items() if key not in ("D", "z") or key in names}
        leaves = grown(inputs)
        y = leetdist.mamba_chunk_scan_combined(**leaves)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="mamba_chunk_scan_combined can be differentiated once"):
            dx.sum().backward()


def test_the_backward_pass_is_mapped(short: None) -> None:
    """By torch.func.vmap: one gradient by one."""
    inputs, _, dy, _ = case_of("skip and gate")
    leaves = grown(inputs)
    y = leetdist.mamba_chunk_scan_combined(**leaves)

    def gradients(dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, tuple(leaves.values()), dy, retain_graph=True)

    several = torch.stack([dy, dy.sin()])
    each = [gradients(one) for one in several]
    for found, wanted in zip(torch.func.vmap(gradients)(several), zip(*each, strict=True), strict=True):
        assert torch.equal(found, torch.stack(wanted))


def test_a_call_that_is_checked_saves_no_more_than_those_after_it(short: None) -> None:
    """Checkpointing asks for it: a call that is computed anew is of a kind that was right before."""
    inputs, options, dy, _ = case_of("limits")
    found = []
    scan = leetdist.mamba_chunk_scan_combined
    for call in (scan, partial(checkpoint, scan, use_reentrant=False)):
        repeats.checked.clear()
        leaves = grown(inputs)
        found.append(torch.autograd.grad(call(**leaves, **options), list(leaves.values()), dy))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_results_can_be_written_over(short: None) -> None:
    inputs, _, dy, dstates = case_of("as Mamba-2's layer")
    found = []
    for double in (Tensor.mul, Tensor.mul_):
        leaves = grown(inputs)
        results = [double(x, 2.0) for x in ours(**leaves)]
        found.append(list(torch.autograd.grad(results, list(leaves.values()), [dy, dstates])))
        factor = torch.tensor(2.0, requires_grad=True)
        with torch.no_grad():
            y, _ = ours(**leaves)
        found[-1] += torch.autograd.grad(double(y, factor).sum(), factor)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
