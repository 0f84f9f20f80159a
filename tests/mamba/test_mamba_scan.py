"""`mamba_chunk_scan_combined`: the recurrence it stands for, and the bits of one device."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import leetdist
from helpers import run_ranks, values
from leetdist.kernels.mamba.pytorch import scan
from leetdist.mamba import passes
from leetdist.reference import relative_error
from leetdist.sequence.grid import shard_lengths

Inputs = dict[str, torch.Tensor]
HEADS, WIDTH, GROUPS, STATE = 6, 16, 2, 24
TOKENS = 150
DOCUMENTS = (0, 1, 40, 40, 90, 150)
SHARDED = ("x", "dt", "B", "C", "z", "seq_idx")


def make(*names: str, rows: int = 2, dtype: torch.dtype = torch.float32, states: int = 0) -> Inputs:
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": torch.randn(rows, TOKENS, HEADS, WIDTH, dtype=dtype),
        "dt": torch.rand(rows, TOKENS, HEADS, dtype=wide) * 0.3,
        "A": -torch.rand(HEADS, dtype=wide) * 4,
        "B": torch.randn(rows, TOKENS, GROUPS, STATE, dtype=dtype),
        "C": torch.randn(rows, TOKENS, GROUPS, STATE, dtype=dtype),
        "D": torch.randn(HEADS, dtype=wide),
        "z": torch.randn(rows, TOKENS, HEADS, WIDTH, dtype=dtype),
        "dt_bias": torch.randn(HEADS, dtype=wide) - 2,
        "initial_states": torch.randn(states or rows, HEADS, WIDTH, STATE, dtype=wide),
    }
    optional = ("D", "z", "dt_bias", "initial_states")
    return {name: x for name, x in inputs.items() if name not in optional or name in names}


def grown(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {
        name: x.to(x.dtype if dtype is None else dtype).detach().clone().requires_grad_(x.is_floating_point())
        for name, x in inputs.items()
    }


def recurrence(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, math.inf), tile=None,
):  # fmt: skip
    """One token after the other: y, and the states at the end."""
    rows, tokens, heads, width = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    B, C = (y.repeat_interleave(heads // y.shape[2], 2) for y in (B, C))
    state = x.new_zeros(rows, heads, width, B.shape[3]) if initial_states is None else initial_states
    bounds = {0: 0, tokens: None} if cu_seqlens is None else None
    outputs, ends = [], []
    last = torch.zeros(rows, dtype=torch.int64)
    if bounds is None:
        outputs = []
        for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            own = slice(begin, end)
            first = None if initial_states is None else initial_states[row : row + 1]
            if begin == end:
                ends.append(first if first is not None else state[:1] * 0)
                continue
            o, s = recurrence(x[:, own], dt[:, own], A, B[:, own], C[:, own], initial_states=first)
            outputs.append(o)
            ends.append(s)
        y, state = torch.cat(outputs, 1), torch.cat(ends)
    else:
        for t in range(tokens):
            decay = torch.exp(dt[:, t] * A)
            if seq_idx is not None:
                decay = decay * (seq_idx[:, t] == last)[:, None]
                last = seq_idx[:, t]
            state = decay[..., None, None] * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            outputs.append((state * C[:, t, :, None]).sum(-1))
        y = torch.stack(outputs, 1)
    if D is not None:
        y = y + x * D.view(heads, -1)
    if z is not None:
        y = y * F.silu(z)
    return y, state


def compute(function: Any, inputs: Inputs, dy: torch.Tensor, dstates: torch.Tensor, **options: Any) -> Inputs:
    """Outputs and gradients by name."""
    y, states = function(**inputs, **options)
    torch.autograd.backward([y, states], [dy.to(y.dtype), dstates.to(states.dtype)])
    grads = {f"d{name}": x.grad for name, x in inputs.items() if x.requires_grad}
    return {"y": y.detach(), "states": states.detach(), **grads}


def ours(**arguments: Any) -> Any:
    return leetdist.mamba_chunk_scan_combined(**arguments, return_final_states=True)


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "bare": ((), {}),
    "skip and gate": (("D", "z"), {}),
    "as Mamba-2's layer": (("D", "dt_bias", "initial_states"), {"dt_softplus": True}),
    "limits": (("dt_bias", "z"), {"dt_softplus": True, "dt_limit": (0.05, 0.2)}),
    "documents": (
        ("D", "z", "dt_bias", "initial_states"),
        {"dt_softplus": True, "cu_seqlens": torch.tensor(DOCUMENTS)},
    ),
    "seq_idx": (("D", "initial_states"), {}),
}


def case_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Inputs, dict[str, Any], torch.Tensor, torch.Tensor]:
    names, options = CASES[name]
    rows, states = (1, len(DOCUMENTS) - 1) if name == "documents" else (2, 2)
    inputs = make(*names, rows=rows, states=states, dtype=dtype)
    if name == "skip and gate":
        inputs["D"] = torch.randn(HEADS, WIDTH, dtype=inputs["A"].dtype)
    if name == "seq_idx":  # the first row begins with document 0, whose initial states are used; the second does not
        inputs["seq_idx"] = torch.randint(0, 5, (2, TOKENS)).sort(1).values
        inputs["seq_idx"][0, :9], inputs["seq_idx"][1] = 0, inputs["seq_idx"][1] + 1
    dy = torch.randn_like(inputs["x"])
    return inputs, options, dy, torch.randn(states, HEADS, WIDTH, STATE)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 4e-7), (torch.float64, 1e-14), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)],
    ids=["float32", "float64", "bfloat16", "float16"],
)
@pytest.mark.parametrize("name", CASES)
def test_is_the_recurrence(name: str, dtype: torch.dtype, bound: float) -> None:
    inputs, options, dy, dstates = case_of(name, dtype)
    right = compute(recurrence, grown(inputs_of(inputs, torch.float64)), dy.double(), dstates.double(), **options)
    found = compute(ours, grown(inputs), dy, dstates, **options)
    assert found.keys() == right.keys()
    for key, x in found.items():
        # Gradients of bf16 pass through one rounding more, of dv; in those of A and dt_bias the tokens' cancel.
        factor = 4 if key in ("dA", "ddt_bias") else 2 if key.startswith("d") else 1
        assert relative_error(x, right[key]) <= bound * factor, key
    assert found["y"].dtype == dtype
    assert found["states"].dtype == torch.promote_types(dtype, torch.float32)


def inputs_of(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def shard(inputs: Inputs, dy: torch.Tensor, dstates: torch.Tensor, lengths: Any, rank: int) -> Any:
    """This rank's part of a case. Gradients of the final states flow in on the last rank."""
    mine = {name: x.split(lengths, 1)[rank] if name in SHARDED else x for name, x in inputs.items()}
    if rank:
        mine.pop("initial_states", None)
    share = dstates if rank == len(lengths) - 1 else torch.zeros_like(dstates)
    return grown(mine), dy.split(lengths, 1)[rank], share


def assert_shards(results: list[Inputs], whole: Inputs) -> None:
    for key, right in whole.items():
        if key == "y" or key[1:] in SHARDED:
            assert torch.equal(torch.cat([found[key] for found in results], 1), right), key
        elif key == "states":
            assert all(torch.equal(found[key], right) for found in results)
        elif key == "dinitial_states":
            assert torch.equal(results[0][key], right)
        else:  # each rank's share
            assert relative_error(sum(found[key] for found in results), right) < 2e-6, key


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["as Mamba-2's layer", "documents", "seq_idx"])
def test_bits_of_one_device(name: str, ranks: int) -> None:
    inputs, options, dy, dstates = case_of(name)
    options = options | {"tile": 16}
    whole = compute(ours, grown(inputs), dy, dstates, **options)
    lengths = shard_lengths(TOKENS, ranks, 16)
    if name == "documents":
        lengths = (TOKENS - 7 * (ranks - 1), *[7] * (ranks - 1))

    def rank(group):
        mine, my_dy, share = shard(inputs, dy, dstates, lengths, group.rank)
        return compute(ours, mine, my_dy, share, **options, group=group)

    assert_shards(leetdist.virtual_ranks(rank, ranks), whole)


def test_bits_of_bf16_with_a_gate() -> None:
    inputs, options, dy, dstates = case_of("skip and gate", torch.bfloat16)
    whole = compute(ours, grown(inputs), dy, dstates, **options)
    lengths = shard_lengths(TOKENS, 3, leetdist.sequence.grid.default_tile(TOKENS))

    def rank(group):
        mine, my_dy, share = shard(inputs, dy, dstates, lengths, group.rank)
        return compute(ours, mine, my_dy, share, **options, group=group)

    results = leetdist.virtual_ranks(rank, 3)
    whole.pop("dD"), [found.pop("dD") for found in results]
    assert_shards(results, whole)


def on_processes(rank: int, case: Any) -> Inputs:
    inputs, options, dy, dstates = case
    lengths = shard_lengths(TOKENS, 2, 16)
    mine, my_dy, share = shard(inputs, dy, dstates, lengths, rank)
    return compute(ours, mine, my_dy, share, **options, tile=16, group=dist.group.WORLD)


def test_bits_on_processes() -> None:
    case = inputs, options, dy, dstates = case_of("seq_idx")
    assert_shards(
        values(run_ranks(on_processes, 2, case)), compute(ours, grown(inputs), dy, dstates, **options, tile=16)
    )


def test_only_the_initial_states_need_a_gradient() -> None:
    """Which the first rank alone has, and the others hand on to it."""
    inputs = make("D", "initial_states")
    initial = inputs.pop("initial_states")
    dy = torch.randn_like(inputs["x"])

    def gradient(group: Any = None) -> Any:
        first = group is None or group.rank == 0
        own = initial.clone().requires_grad_() if first else None
        local = {name: leetdist.shard_sequence(x, 1, group) if name in SHARDED else x for name, x in inputs.items()}
        y = leetdist.mamba_chunk_scan_combined(**local, initial_states=own, group=group, tile=32)
        y.backward(leetdist.shard_sequence(dy, 1, group))
        return own.grad if own is not None else None

    first, *others = leetdist.virtual_ranks(gradient, 3)
    assert torch.equal(first, gradient())
    assert others == [None, None]


@pytest.mark.parametrize("name", ["as Mamba-2's layer", "skip and gate"])
def test_bits_of_any_layout(name: str) -> None:
    """Gradients that are sums over tokens, of D, A and dt_bias, too."""
    inputs, options, dy, dstates = case_of(name)

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x

    found = compute(ours, grown({key: laid_out(x) for key, x in inputs.items()}), laid_out(dy), dstates, **options)
    for key, x in compute(ours, grown(inputs), dy, dstates, **options).items():
        assert torch.equal(found[key], x), key


def test_tensors_of_inference_mode_beside_those_that_learn() -> None:
    inputs, options, dy, dstates = case_of("skip and gate")
    wanted = compute(ours, grown({"dt": inputs["dt"]}) | {k: x for k, x in inputs.items() if k != "dt"}, dy, dstates)
    with torch.inference_mode():
        others = {name: x.clone() for name, x in inputs.items() if name != "dt"}
    found = compute(ours, grown({"dt": inputs["dt"]}) | others, dy, dstates, **options)
    assert found.keys() == wanted.keys() == {"y", "states", "ddt"}
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


def test_outputs_take_the_place_of_what_they_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is learnt: else o is wanted for the gradient of z."""
    inputs, options, dy, dstates = case_of("skip and gate")
    wanted = compute(ours, grown(inputs), dy, dstates, **options)["y"]
    places: list[torch.Tensor] = []

    def scan_outputs(o, *given, spent=False):
        places.append(o)
        return o.copy_(right(o, *given)) if spent else right(o, *given)

    right, kernel = scan.scan_outputs, passes.kernel
    monkeypatch.setattr(passes, "kernel", lambda step, *of: scan_outputs if step is right else kernel(step, *of))
    for learnt, spent in (((), True), (("z",), False), (("D",), False)):
        given = {name: x.detach().requires_grad_(name in learnt) for name, x in inputs.items()}
        y, _ = ours(**given, **options)
        assert torch.equal(y, wanted)
        assert (y.data_ptr() == places[-1].data_ptr()) == spent
        with torch.no_grad():
            y, _ = ours(**given, **options)
        assert torch.equal(y, wanted)
        assert y.data_ptr() == places[-1].data_ptr()


def test_going_on_is_the_whole() -> None:
    inputs = make("D", "initial_states")
    y, states = ours(**inputs, tile=16)
    first, state = ours(**{k: x[:, :64] if k in SHARDED else x for k, x in inputs.items()}, tile=16)
    inputs["initial_states"] = state
    second, state = ours(**{k: x[:, 64:] if k in SHARDED else x for k, x in inputs.items()}, tile=16)
    assert torch.equal(torch.cat((first, second), 1), y)
    assert torch.equal(state, states)


def test_is_that_of_transformers() -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    inputs = make("D", "dt_bias", "initial_states")
    options = {"dt_softplus": True, "dt_limit": (0.0, 0.1), "chunk_size": 32}
    y, states = ours(**inputs, **options)
    inputs["hidden_states"] = inputs.pop("x")
    theirs, their_states = mamba2.mamba2_chunk_scan(**inputs, **options, return_final_states=True)
    assert relative_error(y, theirs) < 2e-6
    assert relative_error(states, their_states) < 2e-6


def test_nothing_comes_from_later_tokens() -> None:
    inputs = make("D", "z")
    y = leetdist.mamba_chunk_scan_combined(**inputs)
    inputs["x"][:, 70] = torch.nan
    assert torch.equal(leetdist.mamba_chunk_scan_combined(**inputs)[:, :70], y[:, :70])


def on_gpu(inputs: Inputs) -> Inputs:
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """The recurrence, and the bits of one device over three virtual ranks."""
    inputs, options, dy, dstates = case_of(name, dtype)
    right = compute(recurrence, grown(inputs_of(inputs, torch.float64)), dy.double(), dstates.double(), **options)
    inputs, dy, dstates, options = on_gpu(inputs), dy.cuda(), dstates.cuda(), options | {"tile": 16}
    whole = compute(ours, grown(inputs), dy, dstates, **options)
    for key, x in whole.items():
        factor = 4 if key in ("dA", "ddt_bias") else 2 if key.startswith("d") else 1
        assert relative_error(x.cpu(), right[key]) <= (2e-6 if dtype == torch.float32 else 3.5e-3) * factor, key
    lengths = shard_lengths(TOKENS, 3, 16)

    def rank(group):
        mine, my_dy, share = shard(inputs, dy, dstates, lengths, group.rank)
        return compute(ours, mine, my_dy, share, **options, group=group)

    results = leetdist.virtual_ranks(rank, 3)
    for key in ("dA", "dD", "ddt_bias"):  # shares, rounded to the dtype of each rank's sum
        for found in (*results, whole):
            found.pop(key, None)
    assert_shards(results, whole)


@pytest.mark.gpu
def test_is_that_of_mamba_ssm() -> None:
    ssd = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    inputs, options, dy, dstates = case_of("as Mamba-2's layer")
    inputs = on_gpu(inputs)
    options = options | {"chunk_size": 64, "return_final_states": True}
    found = compute(leetdist.mamba_chunk_scan_combined, grown(inputs), dy.cuda(), dstates.cuda(), **options)
    theirs = compute(ssd.mamba_chunk_scan_combined, grown(inputs), dy.cuda(), dstates.cuda(), **options)
    for key, x in found.items():  # theirs multiplies fp32 as tf32
        assert relative_error(x, theirs[key]) < 5e-3, key
