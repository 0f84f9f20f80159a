"""The exactness contract in one process: virtual ranks, splits in time, packing, batches; all by torch.equal."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import leetdist
from helpers import assert_leaves_out_the_last
from leetdist.engine import scan as scan_module
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block
from leetdist.kernels.token_decay.pytorch import block as token_block
from leetdist.testing.equality import STEPS, Case, check, compute, differences, make_tensors, standard_cases
from oracle import differing

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("case", standard_cases(CPU), ids=str)
def test_virtual_ranks(case: Case, ranks: int, seed: int) -> None:
    assert not differing(case, ranks, CPU, seed)


@st.composite
def cut_cases(draw: st.DrawFn) -> tuple[Case, int]:
    """Any call, on any number of ranks, with shards of any whole number of tiles, none among them."""
    tokens = draw(st.integers(1, 400))
    tile = draw(st.sampled_from([16, 32, 64, 256]))
    ranks = draw(st.integers(1, 8))
    heads, q_heads, kv_heads, v_heads = draw(
        st.sampled_from([(1, 1, 1, 1), (2, 2, 1, 1), (4, 4, 2, 2), (3, 3, 3, 3), (4, 1, 1, 4), (6, 2, 6, 3)])
    )
    documents = draw(st.none() | st.lists(st.integers(0, tokens), max_size=4).map(sorted))
    cuts = sorted(draw(st.lists(st.integers(0, -(-tokens // tile)), min_size=ranks - 1, max_size=ranks - 1)))
    ends = [*(min(tokens, cut * tile) for cut in cuts), tokens]
    case = Case(
        tokens,
        draw(st.sampled_from([1, 3, 16, 17, 40])),
        draw(st.sampled_from([1, 2, 24, 33, 64])),
        batch=draw(st.integers(1, 3)) if documents is None else 1,
        heads=heads,
        q_heads=q_heads,
        kv_heads=kv_heads,
        v_heads=v_heads,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        scale=draw(st.sampled_from([1.0, -0.3])),
        decay=draw(st.sampled_from(["none", "mixed", "slow", "fast", "gone", "tokens", "restarts"])),
        documents=None if documents is None else (0, *documents, tokens),
        initial=draw(st.booleans()),
        final=draw(st.booleans()),
        learnt=draw(st.booleans()),
        tile=tile,
        method=draw(st.sampled_from(["auto", "block", "lightning", "fleet", "causal_dot_product"])),
        shards=tuple(end - begin for begin, end in pairwise([0, *ends])),
    )
    return case, ranks


@settings(max_examples=60)
@given(cut_cases())
def test_any_call(drawn: tuple[Case, int]) -> None:
    case, ranks = drawn
    assert not differing(case, ranks, CPU)


def test_more_ranks_than_tiles(seed: int) -> None:
    assert not differing(Case(40, 16, 16, initial=True), 8, CPU, seed)
    assert not differing(Case(40, 16, 16, documents=(0, 7, 40), initial=True), 8, CPU, seed)
    assert not differing(Case(40, 16, 16, final=False), 8, CPU, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(6))  # each compiles for seconds a case
@pytest.mark.parametrize("ranks", [3, 8])
def test_virtual_ranks_on_a_gpu(ranks: int, part: int, seed: int) -> None:
    device = torch.device("cuda")
    for case in standard_cases(device, long=131_072)[part::6]:
        assert not differing(case, ranks, device, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dk", "dv", "decay"), [(64, 64, "mixed"), (17, 33, "mixed"), (17, 33, "tokens")])
def test_split_in_time(dtype: torch.dtype, dk: int, dv: int, decay: str) -> None:
    assert_split_in_time(Case(1000, dk, dv, tile=64, dtype=dtype, decay=decay), (64, 640), CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_split_in_time_on_a_gpu(dtype: torch.dtype) -> None:
    for decay in ("mixed", "tokens"):
        case = Case(9000, 128, 128, tile=512, dtype=dtype, decay=decay)
        assert_split_in_time(case, (1024, 5120), torch.device("cuda"))


@pytest.mark.interpreter
def test_split_in_time_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LEETDIST_BACKEND", "triton")
    assert_split_in_time(Case(75, 16, 24, tile=16, heads=2, decay="mixed"), (16, 48), CPU)


def assert_split_in_time(case: Case, cuts: tuple[int, int], device: torch.device) -> None:
    """A call cut at two tile boundaries, state carried over, forward and backward."""
    case = replace(case, initial=True, learnt=case.decay in STEPS)
    tensors = make_tensors(case, device, 1)
    whole = compute(case, tensors, None)
    leaves = {n: x.detach().requires_grad_(n != "log_decay" or case.learnt) for n, x in tensors.inputs.items()}
    decay = leaves["log_decay"]
    state, outputs = leaves["initial_state"], []
    first, second = cuts
    for part in (slice(0, first), slice(first, second), slice(second, None)):
        q, k, v = (leaves[name][:, :, part] for name in "qkv")
        own = decay[:, :, part] if decay.ndim == 3 else decay
        o, state = leetdist.linear_attention(q, k, v, own, initial_state=state, return_state=True, tile=case.tile)
        outputs.append(o)
    torch.autograd.backward([*outputs, state], [*tensors.do.tensor_split(cuts, 2), tensors.dstate])
    assert torch.equal(torch.cat(outputs, 2), whole["o"])
    assert torch.equal(state, whole["state"])
    for name, x in leaves.items():
        if x.requires_grad:
            assert torch.equal(x.grad, whole[f"d{name}"]), name


def assert_states_nobody_reads_change_no_bit(dtype: torch.dtype, device: torch.device, method: str) -> None:
    """What the last tile adds is left out where nobody asks for the final state, and what the first adds to the
    gradient where there is no initial one; asked for and given, as zeros, nothing else is another."""
    q, k, v, do = (torch.randn(2, 2, 500, 64, device=device).to(dtype) for _ in range(4))
    log_decay = torch.tensor([0.0, -0.02], device=device)
    zeros = torch.zeros(2, 2, 64, 64, device=device)

    def call(**options: Any) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = leetdist.linear_attention(*leaves, log_decay, method=method, tile=128, **options)
        o = o[0] if "return_state" in options else o
        return [o, *torch.autograd.grad(o, leaves, do)]

    left_out = call()
    for options in ({"return_state": True}, {"initial_state": zeros.requires_grad_()}):
        assert all(torch.equal(x, y) for x, y in zip(call(**options), left_out, strict=True))


@pytest.mark.parametrize("method", ["block", "lightning", "fleet", "causal_dot_product"])
def test_states_nobody_reads(method: str) -> None:
    assert_states_nobody_reads_change_no_bit(torch.float32, CPU, method)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["block", "lightning", "fleet", "causal_dot_product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_nobody_reads_on_a_gpu(method: str, dtype: torch.dtype) -> None:
    assert_states_nobody_reads_change_no_bit(dtype, torch.device("cuda"), method)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [64, 200])
def test_a_tile_that_is_left_out_is_not_computed(tokens: int, reverse: bool) -> None:
    b, c = torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16)
    log_decay = torch.tensor([-0.01, -0.5])
    assert_leaves_out_the_last(block, b, c, log_decay, Tiles(64, (0, tokens)), reverse=reverse)


@pytest.mark.parametrize("decay", ["mixed", "tokens"])
def test_packed_documents_are_their_own_calls(decay: str) -> None:
    documents = (0, 100, 164, 165, 700)
    case = Case(700, 32, 48, documents=documents, tile=64, decay=decay, initial=True, learnt=False)
    log_decay = case.log_decay()
    tensors = make_tensors(case, CPU, 2)
    packed = compute(case, tensors, None)
    for row, (begin, end) in enumerate(itertools.pairwise(documents)):
        q, k, v = (tensors.inputs[n][:, :, begin:end].detach().requires_grad_() for n in "qkv")
        initial = tensors.inputs["initial_state"][row : row + 1].detach().requires_grad_()
        own = log_decay[:, :, begin:end] if log_decay.ndim == 3 else log_decay
        o, state = leetdist.linear_attention(q, k, v, own, initial_state=initial, return_state=True, tile=64)
        torch.autograd.backward([o, state], [tensors.do[:, :, begin:end], tensors.dstate[row : row + 1]])
        assert torch.equal(o, packed["o"][:, :, begin:end])
        assert torch.equal(state, packed["state"][row : row + 1])
        assert torch.equal(initial.grad, packed["dinitial_state"][row : row + 1])
        for name, x in (("dq", q), ("dk", k), ("dv", v)):
            assert torch.equal(x.grad, packed[name][:, :, begin:end]), name


@pytest.mark.parametrize("decay", ["mixed", "tokens"])
def test_batch_and_threads_change_nothing(decay: str) -> None:
    case = Case(500, 48, 32, batch=3, decay=decay, learnt=decay in STEPS)
    tensors = make_tensors(case, CPU, 3)
    together = compute(case, tensors, None)
    threads = torch.get_num_threads()
    for row in range(case.batch):
        torch.set_num_threads(1 + row % 2)
        inputs = {n: x if x.ndim == 1 else x[row : row + 1] for n, x in tensors.inputs.items()}
        alone = type(tensors)(inputs, tensors.do[row : row + 1], tensors.dstate[row : row + 1])
        for name, x in compute(case, alone, None).items():
            assert torch.equal(x, together[name][row : row + 1]), name
    torch.set_num_threads(threads)


@pytest.mark.parametrize("decay", ["mixed", "tokens"])
def test_run_to_run(decay: str) -> None:
    case = Case(700, decay=decay)
    tensors = make_tensors(case, CPU, 4)
    first, second = compute(case, tensors, None), compute(case, tensors, None)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize(("decay", "kernels"), [("slow", block), ("slow tokens", token_block)])
def test_a_broken_association_is_caught(
    decay: str, kernels: Any, monkeypatch: pytest.MonkeyPatch, forgotten: Any
) -> None:
    """The tempting scan, `S_p = gamma^L S_{p-1} + S_local`, is right to rounding and fails the check: so the check
    can fail."""
    case = Case(1000, decay=decay, learnt=False)

    def regrouped(states, initial, keep, tiles, *, reverse, to_end=True):
        local = exact(states, None, keep, tiles, reverse=reverse, to_end=to_end)
        if initial is None:
            return local
        passed = torch.ones_like(initial)  # of the state that comes, until this tile
        for tile in reversed(range(tiles.count)) if reverse else range(tiles.count):
            states[:, :, tile] += passed * initial
            factor = torch.exp(keep * tiles.spans[tile][1]) if keep.ndim == 1 else keep[:, :, tile]
            passed = passed * factor[..., None, None]
        return None if local is None else local + passed * initial

    exact = kernels.fold
    monkeypatch.setattr(kernels, "fold", regrouped)
    found = leetdist.virtual_ranks(lambda group: check(case, group, CPU, 0), 4)
    assert {d.tensor for result in found for d in result} >= {"o", "dq", "dk", "dv"}
    assert any("tile" in str(d) for result in found for d in result)
    largest = max(abs(d.ours - d.single) for result in found for d in result)
    assert largest < 1e-4  # it was only rounding


def test_a_lost_state_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank starting anew, the mistake that a loss curve hides."""
    case = Case(1000, decay="slow", learnt=False)
    real = scan_module.scan

    def forgetful(states, initial, log_decay, plan, lane, *, reverse):
        final = real(states.clone(), initial, log_decay, plan, lane, reverse=reverse)
        block.fold(states, None, log_decay, plan.tiles, reverse=reverse)
        return final

    monkeypatch.setattr(scan_module, "scan", forgetful)

    def rank(group):
        tensors = make_tensors(case, CPU, 0)
        return compute(case, tensors, group)

    ours = leetdist.virtual_ranks(rank, 3)
    monkeypatch.undo()
    single = compute(case, make_tensors(case, CPU, 0), None)
    assert not list(differences(case, 0, 3, {"o": ours[0]["o"]}, {"o": single["o"]}))
    assert list(differences(case, 1, 3, {"o": ours[1]["o"]}, {"o": single["o"]}))
