"""No output depends on a later token, not even through a NaN; and nothing hides one from those after it."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

import leetdist
from leetdist.engine.checks import METHODS, ONE_DEVICE
from leetdist.kernels.runtime import nvrtc
from leetdist.sequence.virtual import VirtualGroup

CPU = torch.device("cpu")
BAD = (math.nan, math.inf, -math.inf)
# What a bad token of each operand reaches: nothing, its own row, or also those behind or before it.
REACH = {
    "q": {"o": "own", "dk": "before", "dv": "before"},
    "k": {"o": "behind", "state": "all", "dq": "behind", "dv": "own"},
    "v": {"o": "behind", "state": "all", "dq": "behind", "dk": "own"},
    "do": {"dq": "own", "dk": "before", "dv": "before"},
}


def computed(inputs: dict[str, Tensor], gradients: bool, **options: object) -> dict[str, Tensor]:
    """Outputs and gradients of one call."""
    leaves = [inputs[name].clone().requires_grad_(gradients) for name in "qkv"]
    o, state = leetdist.linear_attention(*leaves, inputs["log_decay"], return_state=True, scale=0.5, **options)
    results = {"o": o, "state": state}
    if gradients:
        grads = torch.autograd.grad([o, state], leaves, [inputs["do"], torch.ones_like(state)])
        results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return {name: x.detach() for name, x in results.items()}


def assert_causal(
    tokens: list[int],
    *,
    bounds: tuple[int, ...],
    dims: tuple[int, int] = (16, 24),
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    gradients: bool = True,
    log_decay: tuple[float, ...] = (-0.1, -1e-3, -1.0, 0.0),
    by_token: bool = False,
    **options: object,
) -> None:
    """One bad element after the other at each of `tokens`: all that it does not reach has the bits it has without it,
    and all that it reaches shows it. bounds: of packed documents, or (0, N) for two batch entries."""
    packed, (most, fewer) = len(bounds) > 2, heads
    batch = 1 if packed else 2
    if packed:
        options["cu_seqlens"] = torch.tensor(bounds)
    shapes = {"q": (most, dims[0]), "k": (fewer, dims[0]), "v": (fewer, dims[1]), "do": (most, dims[1])}
    inputs = {
        name: torch.randn(batch, count, bounds[-1], dim).to(device, dtype) for name, (count, dim) in shapes.items()
    }
    inputs["log_decay"] = torch.tensor(log_decay[:most], device=device)
    if by_token:
        spread = torch.rand(batch, most, bounds[-1], device=device) * 1.9
        inputs["log_decay"] = inputs["log_decay"][:, None] * spread
    without = computed(inputs, gradients, **options)
    for token, (operand, reached) in itertools.product(tokens, REACH.items()):
        if operand == "do" and not gradients:
            continue
        entry, head = random.randrange(batch), random.randrange(shapes[operand][0])
        document, begin, end = next((d, b, e) for d, (b, e) in enumerate(itertools.pairwise(bounds)) if b <= token < e)
        document = document if packed else entry
        spans = {"own": (token, token + 1), "behind": (token, end), "before": (begin, token + 1)}
        value, bad = random.choice(BAD), inputs[operand].clone()
        bad[entry, head, token, random.randrange(bad.shape[3])] = value
        found = computed({**inputs, operand: bad}, gradients, **options)
        for name, x in found.items():
            place = f"{value} in {operand} of token {token}, head {head}: {name}"
            if x.shape[1] == bad.shape[1]:
                of_head = [head]
            else:  # those that share the head, or the head that is shared
                share = most // fewer
                of_head = [head // share] if x.shape[1] == fewer else list(range(head * share, head * share + share))
            untouched = torch.ones_like(x, dtype=torch.bool)
            if name in reached:
                rows = (document, of_head) if name == "state" else (entry, of_head, slice(*spans[reached[name]]))
                untouched[rows] = False
                lost = (~x[rows].isfinite()).any(-1)
                assert bool((lost.any(-1) if name == "state" else lost).all()), place
            assert torch.equal(x[untouched], without[name][untouched]), place


def positions(*edges: int) -> list[int]:
    """Both sides of each edge, and a token between each two."""
    between = {random.randrange(a, b) for a, b in itertools.pairwise(edges)}
    return sorted({token for edge in edges for token in (edge - 1, edge)} | between)


@pytest.mark.parametrize("by_token", [False, True], ids=["a decay a head", "a decay a token"])
@pytest.mark.parametrize("method", METHODS)
def test_on_the_cpu(method: str, by_token: bool) -> None:
    gradients = method not in ONE_DEVICE
    # Lightning's blocks are 256 tokens, block's chunks 128, recursion's leaves 64.
    tile = {"block": 256, "lightning": 512}.get(method, 32)
    options = {"method": method, "gradients": gradients, "by_token": by_token} | ({"tile": tile} if gradients else {})
    length = 2 * tile + tile // 4 if tile > 32 else 150
    assert_causal([0, *positions(tile // 2, tile), length - 1], bounds=(0, length), **options)
    assert_causal([39, 40, random.randrange(40, 99), 99, 149], bounds=(0, 40, 40, 100, 150), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(dtype: torch.dtype) -> None:
    assert_causal(positions(16, 128), bounds=(0, 140), dtype=dtype, tile=128)


@pytest.mark.real_empty
@pytest.mark.parametrize("bad", BAD)
def test_documents_of_one_tile_beside_longer_ones(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed by themselves where no state is asked for, into the memory of all; no memory is zeros here, nor
    the NaN that tests take it to be."""
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: real(*args, **kwargs).fill_(1))
    begin, end = 50, 70
    inputs = {name: torch.randn(1, 2, 130, 16) for name in ("q", "k", "v", "do")}
    log_decay, bounds = torch.tensor([-0.1, -0.01]), torch.tensor([0, begin, begin, end, 130])

    def results() -> list[Tensor]:
        leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
        o = leetdist.linear_attention(*leaves, log_decay, cu_seqlens=bounds, tile=32, method="block")
        return [o.detach(), *torch.autograd.grad(o, leaves, inputs["do"])]

    without = results()
    for x in inputs.values():
        kept, x[0, 1, 60, 3] = x[0, 1, 60, 3].clone(), bad
        for found, clean in zip(results(), without, strict=True):
            assert torch.equal(found[:, :, :begin], clean[:, :, :begin])
            assert torch.equal(found[:, :, end:], clean[:, :, end:])
            assert torch.equal(found[:, 0], clean[:, 0])
        x[0, 1, 60, 3] = kept


@pytest.mark.parametrize("method", ["block", "causal_dot_product"])
def test_on_ranks(method: str) -> None:
    """As on one device, where no head forgets a whole tile (leetdist.engine.scan says what is then)."""
    q, k, v = (torch.randn(1, 3, 100, 8) for _ in range(3))
    log_decay = torch.tensor([-0.1, -1e-3, -0.5])

    def sharded() -> Tensor:
        def rank(group: VirtualGroup) -> Tensor:
            mine = (leetdist.shard_sequence(x, 2, group, tile=16) for x in (q, k, v))
            return leetdist.linear_attention(*mine, log_decay, group=group, tile=16, method=method)

        return torch.cat(leetdist.virtual_ranks(rank, 3), 2)

    without = sharded()
    for x, token in itertools.product((k, v), (31, 32, 50)):
        kept, x[:, 1, token] = x[:, 1, token].clone(), math.nan
        o = sharded()
        one = leetdist.linear_attention(q, k, v, log_decay, tile=16, method=method)
        assert torch.equal(o.nan_to_num(nan=1e9), one.nan_to_num(nan=1e9))
        assert torch.equal(o[:, :, :token], without[:, :, :token])
        assert torch.equal(o[:, ::2], without[:, ::2])
        assert bool(o[:, 1, token:].isnan().all())
        x[:, 1, token] = kept


def assert_bad_steps_show(method: str, device: torch.device) -> None:
    """What is no log-decay makes NaN of its head's outputs, from its token to its document's end, and of no other."""
    q, k, v = (torch.randn(1, 2, 150, 16, device=device) for _ in range(3))
    steps = -torch.rand(1, 2, 150, device=device)
    options = {"cu_seqlens": torch.tensor([0, 20, 110, 150]), "return_state": True, "method": method}
    options |= {} if method in ONE_DEVICE else {"tile": 32}
    o, state = leetdist.linear_attention(q, k, v, steps, **options)
    # Without tiles, and without an initial state, the first token of a document decays nothing.
    tokens = (21, 52, 77) if method in ONE_DEVICE else (20, 52, 77)
    for value, token in itertools.product((math.nan, 1e-6, math.inf), tokens):
        bad = steps.clone()
        bad[0, 1, token] = value
        found, after = leetdist.linear_attention(q, k, v, bad, **options)
        seen = torch.zeros_like(o, dtype=torch.bool)
        seen[:, 1, token:110] = True
        assert bool(found[seen].isnan().all()), (value, token)
        assert bool(after[1, 1].isnan().all())
        assert torch.equal(found[~seen], o[~seen])
        after[1, 1] = state[1, 1]
        assert torch.equal(after, state)
    token = [x[:, :, :1].contiguous() for x in (q, k, v)]
    for value in (math.nan, 1e-6, math.inf):
        one = torch.tensor([[[-0.1], [value]]], device=device)
        o, after = leetdist.linear_attention_step(*token, state[:1], one)
        assert o.isnan().all(-1).flatten().tolist() == [False, True]
        assert after.isnan().all(-1).all(-1).flatten().tolist() == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_bad_steps_that_nobody_has_read(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("checks", "planning"):
        monkeypatch.setattr(f"leetdist.engine.{module}.bad_step", lambda *_, **__: None)
    assert_bad_steps_show(method, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_bad_steps_on_a_gpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_bad_steps_show(method, torch.device("cuda"))
    monkeypatch.setenv("LEETDIST_CHECK_VALUES", "1")
    x, steps = torch.randn(1, 2, 40, 16, device="cuda"), torch.zeros(1, 2, 40, device="cuda")
    leetdist.linear_attention(x, x, x, steps, method=method)
    steps[0, 1, 7] = 0.5
    with pytest.raises(ValueError, match=r"log_decay must be <= 0 .*got 0.5 for head 1 at token 7"):
        leetdist.linear_attention(x, x, x, steps, method=method)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["auto", "block", "lightning", "fleet", "causal_dot_product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float32 or nvrtc.version() is None:  # tests/kernels/test_bad_tokens.py: what Gluon's lack
        monkeypatch.setenv("LEETDIST_HOPPER", "0")
    # Over 300 tokens, gamma = e^-0.1 leaves what fp32 can hold, and so does any of the others but e^-1.
    options = {"dtype": dtype, "device": torch.device("cuda"), "method": method, "log_decay": (-0.1, -1e-3, -0.2, 0.0)}
    assert_causal([0, *positions(128, 256), 299], bounds=(0, 300), dims=(128, 128), tile=256, **options)
    assert_causal([39, 40, 99, 149], bounds=(0, 40, 40, 100, 150), dims=(64, 128), tile=128, **options)
