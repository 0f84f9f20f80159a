"""The causal convolution: what it computes, and that its bits do not depend on where the sequence is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import leetdist
from helpers import run_ranks, values
from leetdist.kernels.mamba.pytorch import conv
from leetdist.nn import causal_conv1d
from leetdist.reference import relative_error

CUTS = [(67,), (40, 27), (1, 1, 0, 65), (2, 30, 34, 1)]
DOCUMENTS = (0, 5, 5, 6, 30, 67)


def make(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(batch, 67, 9, dtype=dtype),
        "weight": torch.randn(9, 4),
        "bias": torch.randn(9),
        "initial": torch.randn(batch, 3, 9, dtype=dtype),
    }


def exact(x, weight, bias, initial=None, activation="silu"):
    """PyTorch's own convolution, in fp64."""
    before = torch.zeros_like(x[:, :3]) if initial is None else initial
    given = torch.cat((before, x), 1).transpose(1, 2).double()
    y = F.conv1d(given, weight.double()[:, None], bias.double(), groups=len(weight)).transpose(1, 2)
    return F.silu(y) if activation else y


def grown(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.clone().requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 1e-15), (torch.bfloat16, 2.4e-3)], ids=str
)
@pytest.mark.parametrize("activation", ["silu", None])
def test_is_a_convolution(dtype: torch.dtype, bound: float, activation: str | None) -> None:
    inputs = make(dtype)
    if dtype == torch.float64:
        inputs = {name: x.double() for name, x in inputs.items()}
    ours, theirs = grown(inputs), grown({name: x.double() for name, x in inputs.items()})
    dy = torch.randn(2, 67, 9, dtype=dtype)
    y = causal_conv1d(**ours, activation=activation)
    right = exact(**theirs, activation=activation)
    y.backward(dy)
    right.backward(dy.double())
    assert y.dtype == dtype
    assert relative_error(y.detach(), right.detach()) <= bound
    for name, x in ours.items():
        assert relative_error(x.grad, theirs[name].grad) <= bound, name


def compute(inputs, dy, dstate, **options):
    y, state = causal_conv1d(**inputs, activation="silu", return_state=True, **options)
    torch.autograd.backward([y, state], [dy, dstate])
    return y.detach(), state.detach(), {name: x.grad for name, x in inputs.items()}


@pytest.mark.parametrize("lengths", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("told", [None, "cu_seqlens", "seq_idx"])
def test_bits_of_one_device(lengths: tuple[int, ...], dtype: torch.dtype, told: str | None) -> None:
    inputs = make(dtype, batch=1 if told == "cu_seqlens" else 2)
    if told == "cu_seqlens":
        del inputs["initial"]
    rows = len(inputs["x"])
    dy, dstate = torch.randn_like(inputs["x"]), torch.randn(5 if told == "cu_seqlens" else rows, 3, 9, dtype=dtype)
    seq_idx = torch.randint(0, 9, (rows, 67), dtype=torch.int32).sort(1).values
    options = {"cu_seqlens": torch.tensor(DOCUMENTS)} if told == "cu_seqlens" else {}
    whole_y, whole_state, whole = compute(
        grown(inputs), dy, dstate, **options, **({"seq_idx": seq_idx} if told == "seq_idx" else {})
    )

    def rank(group):
        mine = dict(inputs)
        if group.rank:
            mine.pop("initial", None)
        mine["x"], my_dy, my_idx = (x.split(lengths, 1)[group.rank] for x in (inputs["x"], dy, seq_idx))
        more = {"seq_idx": my_idx} if told == "seq_idx" else {}
        share = dstate if group.rank == group.size - 1 else torch.zeros_like(dstate)
        return compute(grown(mine), my_dy, share, **options, **more, group=group)

    results = leetdist.virtual_ranks(rank, len(lengths))
    assert torch.equal(torch.cat([y for y, _, _ in results], 1), whole_y)
    assert all(torch.equal(state, whole_state) for _, state, _ in results)
    assert torch.equal(torch.cat([grads["x"] for _, _, grads in results], 1), whole["x"])
    if "initial" in inputs:
        assert torch.equal(results[0][2]["initial"], whole["initial"])
    for name in ("weight", "bias"):
        assert relative_error(sum(grads[name] for _, _, grads in results), whole[name]) < 1e-6


@pytest.mark.parametrize("told", ["cu_seqlens", "seq_idx"])
def test_documents_are_as_if_alone(told: str) -> None:
    inputs = make(batch=1)
    del inputs["initial"]
    spans = list(pairwise(DOCUMENTS))
    dy = torch.randn_like(inputs["x"])
    inputs["x"][:, 29] = torch.nan  # reaches its own document only, though its neighbour sees it
    told_by = {"cu_seqlens": torch.tensor(DOCUMENTS)}
    if told == "seq_idx":
        told_by = {"seq_idx": torch.repeat_interleave(torch.arange(5), torch.tensor([b - a for a, b in spans]))[None]}
    leaves = grown(inputs)
    y = causal_conv1d(**leaves, activation="silu", **told_by)
    y.backward(dy)
    for begin, end in spans:
        if begin == end:
            continue
        own = grown(inputs | {"x": inputs["x"][:, begin:end]})
        alone = causal_conv1d(**own, activation="silu")
        alone.backward(dy[:, begin:end])
        torch.testing.assert_close(y[:, begin:end], alone, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(leaves["x"].grad[:, begin:end], own["x"].grad, rtol=0, atol=0, equal_nan=True)
    assert bool(y[:, 30:].isfinite().all())


@pytest.mark.parametrize("own", [1, 2, 5])
def test_what_is_kept_of_a_last_document(own: int) -> None:
    """Nothing of the document before it, where it has fewer tokens than the convolution sees."""
    inputs = make(batch=1)
    del inputs["initial"]
    x = inputs.pop("x")
    seq_idx = (torch.arange(30) >= 30 - own).int()[None]

    def state(group=None):
        given = (leetdist.shard_sequence(y, 1, group, tile=16) for y in (x[:, :30], seq_idx))
        return causal_conv1d(next(given), **inputs, seq_idx=next(given), return_state=True, group=group)[1]

    whole = causal_conv1d(x[:, 30 - own :], **inputs)
    assert torch.equal(causal_conv1d(x[:, 30:], **inputs, initial=state()), whole[:, own:])
    assert all(torch.equal(found, state()) for found in leetdist.virtual_ranks(state, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("told", [None, "cu_seqlens"])
@pytest.mark.parametrize("numbers", [1, 100])
def test_bits_do_not_depend_on_what_a_thread_takes_at_once(
    numbers: int, told: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(dtype, batch=1)
    options = {"cu_seqlens": torch.tensor(DOCUMENTS)} if told else {}
    if told:
        del inputs["initial"]
    dy, dstate = torch.randn_like(inputs["x"]), torch.randn(5 if told else 1, 3, 9, dtype=dtype)
    whole_y, _, whole = compute(grown(inputs), dy, dstate, **options)
    monkeypatch.setattr(conv, "SLAB", numbers)
    y, _, grads = compute(grown(inputs), dy, dstate, **options)
    assert torch.equal(y, whole_y)
    assert all(torch.equal(grads[name], grad) for name, grad in whole.items())


def test_one_after_the_other_is_the_whole() -> None:
    inputs = make()
    whole, last = causal_conv1d(**inputs, activation="silu", return_state=True)
    state, parts = inputs.pop("initial"), []
    for x in inputs.pop("x").split([30, 1, 1, 35], 1):
        y, state = causal_conv1d(x, **inputs, activation="silu", initial=state, return_state=True)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, last)


@pytest.mark.parametrize("way", ["alone", "compiled", "ranks"])
def test_what_is_kept_is_little(way: str) -> None:
    """It may live on for long, and x, of a prompt in all layers, does not with it."""
    inputs = make()

    def kept(x: torch.Tensor, group: Any = None) -> torch.Tensor:
        return causal_conv1d(x, inputs["weight"], return_state=True, group=group)[1]

    def rank(group: Any) -> torch.Tensor:
        return kept(leetdist.shard_sequence(inputs["x"], 1, group), group)

    if way == "ranks":
        found = leetdist.virtual_ranks(rank, 2)
    else:
        found = [(torch.compile(kept, backend="aot_eager") if way == "compiled" else kept)(inputs["x"])]
    for state in found:
        assert torch.equal(state, inputs["x"][:, -3:])
        assert state.untyped_storage().nbytes() <= 2 * state.nbytes


def test_any_layout_means_its_values() -> None:
    inputs = make()
    whole = causal_conv1d(**inputs, activation="silu")
    x = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(2, 67, 20)
    wide[..., 3:12] = inputs["x"]
    for other in (x, wide[..., 3:12]):
        assert torch.equal(causal_conv1d(**inputs | {"x": other}, activation="silu"), whole)
    alone = [
        causal_conv1d(**inputs | {k: inputs[k][i : i + 1] for k in ("x", "initial")}, activation="silu") for i in (0, 1)
    ]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, "x must be floating of shape"),
        ({"weight": torch.zeros(8, 4)}, "weight must have shape"),
        ({"bias": torch.zeros(8)}, "bias must have shape"),
        ({"activation": "relu"}, "activation must be one of None, silu"),
        ({"activation": torch.ones(2).numpy()}, "activation must be one of None, silu"),
        ({"seq_idx": torch.zeros(2, 67)}, "seq_idx must be int32"),
        ({"seq_idx": torch.zeros(1, 67, dtype=torch.int32)}, "seq_idx must be int32"),
        ({"cu_seqlens": torch.tensor([0, 67])}, "B must be 1"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, 67])}, "cu_seqlens must start at 0 and not decrease"),
        ({"weight": torch.ones(9, 4, dtype=torch.int32)}, "weight must be floating"),
        ({"bias": torch.ones(9, dtype=torch.int32)}, "bias must be floating"),
        ({"seq_idx": [0]}, "seq_idx must be a tensor or None"),
        ({"initial": torch.zeros(2, 4, 9)}, "initial must be torch.float32 of shape"),
        ({"return_state": 1}, "return_state must be True or False"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    inputs = make()
    del inputs["initial"]
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**inputs | change)

    def rank(group):
        with pytest.raises(ValueError, match=message):
            causal_conv1d(**inputs | (change if group.rank == 0 else {}), group=group)

    leetdist.virtual_ranks(rank, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_documents_end_with_the_sequence(ranks: int) -> None:
    x = torch.zeros(1, 32 // ranks, 9)

    def rank(group):
        with pytest.raises(ValueError, match="cu_seqlens must end at the number of tokens on all ranks, 32, got 31"):
            causal_conv1d(x, torch.ones(9, 4), cu_seqlens=torch.tensor([0, 31]), group=group)

    if ranks == 1:
        rank(None)
    else:
        leetdist.virtual_ranks(rank, ranks)


def test_documents_are_the_same_on_all_ranks() -> None:
    def rank(group):
        documents = torch.tensor([0, 10 + group.rank, 32])
        with pytest.raises(ValueError, match="rank 1 has cu_seqlens"):
            causal_conv1d(torch.zeros(1, 16, 9), torch.ones(9, 4), cu_seqlens=documents, group=group)

    leetdist.virtual_ranks(rank, 2)


def test_a_bias_is_that_of_all_ranks() -> None:
    def rank(group):
        bias = torch.ones(9) if group.rank else None
        with pytest.raises(ValueError, match="rank 1 has bias a tensor, rank 0 has None"):
            causal_conv1d(torch.zeros(1, 16, 9), torch.ones(9, 4), bias, group=group)

    leetdist.virtual_ranks(rank, 2)


def on_processes(rank: int, inputs, dy) -> tuple[torch.Tensor, torch.Tensor]:
    mine = inputs | {"x": inputs["x"].split((60, 7), 1)[rank].clone().requires_grad_()}
    y = causal_conv1d(**mine, activation="silu", group=dist.group.WORLD)
    y.backward(dy.split((60, 7), 1)[rank])
    return y.detach(), mine["x"].grad


def test_on_processes() -> None:
    inputs = make()
    del inputs["initial"]
    dy = torch.randn_like(inputs["x"])
    results = values(run_ranks(on_processes, 2, inputs, dy))
    leaves = grown(inputs)
    y = causal_conv1d(**leaves, activation="silu")
    y.backward(dy)
    assert torch.equal(torch.cat([y for y, _ in results], 1), y)
    assert torch.equal(torch.cat([dx for _, dx in results], 1), leaves["x"].grad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = {name: x.cuda() for name, x in make(dtype).items()}
    dy, dstate = (torch.randn(2, n, 9, dtype=dtype, device="cuda") for n in (67, 3))
    whole_y, _, whole = compute(grown(inputs), dy, dstate)
    assert relative_error(whole_y, exact(**inputs)) <= (3e-7 if dtype == torch.float32 else 2.4e-3)
    lengths = CUTS[3]

    def rank(group):
        mine = {name: x for name, x in inputs.items() if name != "initial" or group.rank == 0}
        mine["x"], my_dy = (x.split(lengths, 1)[group.rank] for x in (inputs["x"], dy))
        share = dstate if group.rank == group.size - 1 else torch.zeros_like(dstate)
        return compute(grown(mine), my_dy, share, group=group)

    results = leetdist.virtual_ranks(rank, len(lengths))
    assert torch.equal(torch.cat([y for y, _, _ in results], 1), whole_y)
    assert torch.equal(torch.cat([grads["x"] for _, _, grads in results], 1), whole["x"])
    assert torch.equal(results[0][2]["initial"], whole["initial"])


def test_tensors_of_inference_mode_beside_a_weight_that_learns() -> None:
    x, weight = torch.randn(1, 20, 6), torch.randn(6, 4, requires_grad=True)
    with torch.inference_mode():
        other = x.clone()
    grads = [torch.autograd.grad(leetdist.nn.causal_conv1d(given, weight).sum(), weight)[0] for given in (other, x)]
    assert torch.equal(*grads)
