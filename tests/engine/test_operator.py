"""The operator against the fp64 oracles: outputs, states and every gradient."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch

import leetdist
from leetdist import reference
from leetdist.testing.equality import Case, make_tensors
from oracle import BOUNDS, GRADIENT_FACTOR, assert_matches_oracle

CASES = [
    Case(1, 16, 16),
    Case(2, 16, 32, batch=64),  # of 3, 6 % drew roundings beyond bf16's bound, which average out over many
    Case(63, 17, 40, heads=2, decay="slow"),
    Case(200, 64, 64, decay="mixed", batch=2, initial=True),
    Case(333, 32, 96, decay="none", heads=2, model_layout=True, initial=True),
    Case(260, 48, 16, decay="fast", heads=6, kv_heads=2, batch=2),
    Case(150, 16, 16, decay="gone", kv_heads=1),
    Case(500, 32, 32, decay="lightning", documents=(0, 1, 1, 120, 384, 500), initial=True, heads=2),
    Case(300, 16, 16, tile=32, heads=2),
    Case(96, 256, 200, heads=1, decay="slow"),
    Case(700, 32, 16, heads=2, decay="slow", tile=512, scale=0.2, initial=True),  # several chunks a tile
    Case(300, 16, 24, heads=6, decay="extreme", tile=256, initial=True),
    Case(333, 32, 48, heads=4, q_heads=1, kv_heads=2, v_heads=4, decay="tokens", batch=2, initial=True),
    Case(700, 16, 32, heads=2, decay="restarts", documents=(0, 1, 1, 600, 700), initial=True, tile=512, scale=0.2),
    Case(520, 24, 16, heads=4, v_heads=1, decay="slow tokens", model_layout=True),
]
INTERPRETED_CASES = [
    Case(1, 16, 16, heads=1),
    Case(45, 17, 24, heads=2, kv_heads=1, decay="slow", initial=True, tile=16),
    Case(70, 32, 16, heads=1, decay="mixed", model_layout=True, tile=32),
    Case(60, 16, 16, heads=1, documents=(0, 20, 20, 60), initial=True, tile=16),
    Case(150, 16, 16, heads=1, decay="slow", tile=128, scale=0.2, initial=True),  # several chunks a tile
    Case(70, 16, 16, heads=6, decay="extreme", tile=64, initial=True),
    Case(150, 16, 24, heads=2, q_heads=1, decay="tokens", tile=128, scale=0.2, initial=True),
    Case(50, 16, 16, heads=2, decay="restarts", documents=(0, 20, 20, 50), initial=True, tile=16),
]


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case, dtype: torch.dtype, seed: int) -> None:
    assert_matches_oracle(replace(case, dtype=dtype), torch.device("cpu"), seed)


# Triton's interpreter multiplies bf16 as integers, so bf16 is left to the GPU.
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=str)
def test_triton_interpreted(case: Case, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LEETDIST_BACKEND", "triton")
    assert_matches_oracle(replace(case, dtype=dtype), torch.device("cpu"), seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(BOUNDS)[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", [*CASES, Case(4096, 128, 128, heads=32)], ids=str)
def test_gpu(case: Case, dtype: torch.dtype, seed: int) -> None:
    assert_matches_oracle(replace(case, dtype=dtype), torch.device("cuda"), seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(BOUNDS)[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_gpu_long(dtype: torch.dtype, seed: int) -> None:
    """131,072 tokens, on sampled rows and heads."""
    case = Case(131_072, 128, 128, heads=32, dtype=dtype, learnt=False, model_layout=True)
    tensors = make_tensors(case, torch.device("cuda"), seed)
    with torch.no_grad():
        o = leetdist.linear_attention(**tensors.inputs)
    heads = [0, 13, 31]
    q, k, v = (tensors.inputs[name][:, heads] for name in "qkv")
    rows = torch.randint(case.tokens, (512,), device="cuda")
    rows[:2] = torch.tensor([0, case.tokens - 1])
    exact = reference.quadratic(q, k, v, tensors.inputs["log_decay"][heads], rows=rows)
    error = reference.relative_error(o[:, heads][:, :, rows], exact)
    print(f"{dtype}: relative error at 131,072 tokens {error:.2e}")
    assert error <= BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(BOUNDS)[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("decay", ["tokens", "slow tokens"])
def test_gpu_long_with_a_decay_a_token(decay: str, dtype: torch.dtype, seed: int) -> None:
    """131,072 tokens, on sampled rows; the gradients that these send to every token."""
    case = Case(131_072, 128, 64, heads=2, q_heads=1, dtype=dtype, decay=decay)
    tensors = make_tensors(case, torch.device("cuda"), seed)
    leaves = [tensors.inputs[name].requires_grad_() for name in ("q", "k", "v", "log_decay")]
    rows = torch.randint(case.tokens, (64,), device="cuda").unique()
    o = leetdist.linear_attention(*leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = reference.quadratic(*exact, rows=rows)
    do = torch.zeros_like(tensors.do)
    do[:, :, rows] = tensors.do[:, :, rows]
    grads = torch.autograd.grad(o, leaves, do)
    wanted = torch.autograd.grad(expected, exact, do[:, :, rows].double())
    bounds = [BOUNDS[dtype], *[GRADIENT_FACTOR * BOUNDS[dtype]] * 3]
    bounds += [{torch.float32: 2e-6, torch.bfloat16: 2e-3}.get(dtype, BOUNDS[dtype])]  # of log_decay
    found = [(o[:, :, rows], expected), *zip(grads, wanted, strict=True)]
    errors = [reference.relative_error(x, y) for x, y in found]
    print(f"{dtype}, {decay}: relative errors of o, dq, dk, dv, d log_decay {' '.join(f'{e:.1e}' for e in errors)}")
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True))


@pytest.mark.gpu
def test_gpu_past_two_billion_elements() -> None:
    """Offsets beyond 2^31 elements: the last rows of a tensor too long for 32 bits, against a short call."""
    tokens, tail = (1 << 31) // (8 * 128) + 5000, 2048
    q, k, v = (torch.randn(1, tokens, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    assert q.numel() > 1 << 31
    # gamma^1000 is 0: the tail depends on nothing before it.
    log_decay = torch.full((8,), -0.2, device="cuda")
    for x in (q, k, v):
        x.requires_grad_()
    o = leetdist.linear_attention(q, k, v, log_decay)
    exact = reference.quadratic(*(x[:, :, -tail:].detach() for x in (q, k, v)), log_decay)
    assert reference.relative_error(o[:, :, -1000:], exact[:, :, -1000:]) <= BOUNDS[torch.bfloat16]
    do = torch.zeros_like(o)
    do[:, :, -500:] = torch.randn_like(do[:, :, -500:])
    o.backward(do)
    assert q.grad is not None
    assert v.grad is not None
    assert float(q.grad[:, :, : tokens // 2].abs().max()) == 0
    leaves = [x.detach()[:, :, -tail:].double().requires_grad_() for x in (q, k, v)]
    reference.quadratic(*leaves, log_decay).backward(do[:, :, -tail:].double())
    for x, leaf in zip((q, k, v), leaves, strict=True):
        error = reference.relative_error(x.grad[:, :, -1000:], leaf.grad[:, :, -1000:])
        assert error <= GRADIENT_FACTOR * BOUNDS[torch.bfloat16]


def test_oracles_agree() -> None:
    """Two statements of the definition that share no code give the same numbers."""
    q, k, v = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 12)
    log_decay, initial = -torch.rand(4), torch.randn(2, 4, 8, 12)
    options = {"scale": 0.3, "initial_state": initial}
    o, _ = reference.recurrence(q, k, v, log_decay, **options)
    rows = torch.tensor([0, 17, 49])
    torch.testing.assert_close(reference.quadratic(q, k, v, log_decay, **options), o)
    torch.testing.assert_close(reference.quadratic(q, k, v, log_decay, rows=rows, **options), o[:, :, rows])
    every = log_decay[:, None].expand(2, 4, 50)
    assert torch.equal(reference.recurrence(q, k, v, every, **options)[0], o)
    steps = -torch.rand(2, 4, 50)
    steps[:, 1, 20:30] = torch.tensor([-50.0, -math.inf]).repeat(5)
    o, _ = reference.recurrence(q, k, v, steps, **options)
    torch.testing.assert_close(reference.quadratic(q, k, v, steps, rows=rows, **options), o[:, :, rows])


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_gradcheck(tokens: int, by_token: bool) -> None:
    """Every gradient of outputs and final state, by finite differences in fp64."""
    shape = {"dtype": torch.float64, "requires_grad": True}
    q, k, v = (torch.randn(1, heads, tokens, dim, **shape) for heads, dim in ((2, 3), (1, 3), (1, 4)))
    log_decay = torch.tensor([-0.05, -1.0], **shape)
    if by_token:
        log_decay = (-torch.rand(1, 2, tokens, dtype=torch.float64) - 1e-3).requires_grad_()
    initial = torch.randn(1, 2, 3, 4, **shape)

    def function(q, k, v, log_decay, initial):
        return leetdist.linear_attention(
            q, k, v, log_decay, scale=0.7, initial_state=initial, return_state=True, tile=16
        )

    assert torch.autograd.gradcheck(function, (q, k, v, log_decay, initial))


@pytest.mark.parametrize("by_token", [False, True])
def test_step_continues_a_sequence(by_token: bool) -> None:
    q, k, v = (torch.randn(2, heads, 20, 16) for heads in (1, 2, 4))
    log_decay = -torch.rand(2, 4, 20) if by_token else -torch.rand(4)
    whole = leetdist.linear_attention(q, k, v, log_decay, scale=0.25)
    first = [x[:, :, :15] for x in (q, k, v)]
    before = log_decay[:, :, :15] if by_token else log_decay
    _, state = leetdist.linear_attention(*first, before, scale=0.25, return_state=True)
    for t in range(15, 20):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        own = log_decay[:, :, t : t + 1] if by_token else log_decay
        o, state = leetdist.linear_attention_step(*token, state, own, scale=0.25)
        assert reference.relative_error(o, whole[:, :, t : t + 1]) < 1e-6


def test_step_gradcheck() -> None:
    shape = {"dtype": torch.float64, "requires_grad": True}
    q, k, v = (torch.randn(1, 2, 1, 3, **shape) for _ in range(3))
    state, log_decay = torch.randn(1, 2, 3, 3, **shape), torch.tensor([-0.1, -1.0], **shape)
    step = leetdist.linear_attention_step
    by_token = torch.tensor([[[-0.1], [-1.0]]], **shape)
    for decay in (log_decay, by_token):
        assert torch.autograd.gradcheck(lambda *x: step(*x, scale=0.5), (q, k, v, state, decay))


def test_gradients_only_where_wanted() -> None:
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    v.requires_grad_()
    _, state = leetdist.linear_attention(q, k, v, return_state=True)
    state.sum().backward()  # o takes no part
    assert v.grad is not None
    exact = k.sum(-1, keepdim=True).expand_as(v)
    assert reference.relative_error(v.grad, exact) < 1e-6
    assert q.grad is None
    assert k.grad is None


def test_autocast_changes_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    expected = leetdist.linear_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(leetdist.linear_attention(q, k, v), expected)


def test_last_dimension_need_not_be_contiguous() -> None:
    q, k, v = (torch.randn(1, 2, 16, 40).mT for _ in range(3))
    expected = leetdist.linear_attention(*(x.contiguous() for x in (q, k, v)))
    assert torch.equal(leetdist.linear_attention(q, k, v), expected)


def test_a_decay_of_zeros_is_no_decay() -> None:
    """To the last bit, forward and backward; and one that is the same for all tokens is a constant one, to rounding."""
    q, k, v, do = (torch.randn(2, heads, 300, 16) for heads in (4, 2, 4, 4))
    initial, dstate = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)

    def results(log_decay: torch.Tensor | None) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, initial)]
        o, state = leetdist.linear_attention(
            *leaves[:3], log_decay, initial_state=leaves[3], return_state=True, tile=256
        )
        return [o, state, *torch.autograd.grad([o, state], leaves, [do, dstate])]

    for x, y in zip(results(torch.zeros(2, 4, 300)), results(None), strict=True):
        assert torch.equal(x, y)
    constant = torch.tensor([-1e-3, -0.1, -3.0, 0.0])
    for x, y in zip(results(constant[:, None].expand(2, 4, 300)), results(constant), strict=True):
        assert reference.relative_error(x, y) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["slow", "strong and weak", "restarts"])
def test_decays_keep_their_digits(kind: str, dtype: torch.dtype) -> None:
    """100,000 tokens of -1e-6; steps of -50 among others of -1e-3, which a running sum would round away; -inf."""
    tokens = 100_000 if kind == "slow" else 3000
    q, k, v = (torch.randn(1, 1, tokens, 16).to(dtype) for _ in range(3))
    steps = torch.full((1, 1, tokens), -1e-6 if kind == "slow" else -1e-3)
    if kind != "slow":
        steps[..., torch.rand(tokens) < 0.2] = -50.0 if kind == "strong and weak" else -math.inf
    do = torch.zeros_like(v)
    do[:, :, -700:] = torch.randn(700, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, steps)]
    o = leetdist.linear_attention(*leaves)
    exact = [x.double().requires_grad_() for x in (q, k, v, steps)]
    rows = torch.arange(tokens - 700, tokens)
    expected = _by_chunks(*exact)
    grads = torch.autograd.grad(o, leaves, do)
    theirs = torch.autograd.grad(expected, exact, do.double())
    bound = 2e-6 if dtype == torch.float32 else 2e-3
    assert reference.relative_error(o[:, :, rows], expected[:, :, rows]) < bound
    for name, x, y in zip(("dq", "dk", "dv", "dlog_decay"), grads, theirs, strict=True):
        assert reference.relative_error(x, y) < bound, name


def _by_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The definition in fp64, differentiable: 250 tokens at a time by the quadratic form, their state carried on."""
    state, outputs = torch.zeros(1, 1, q.shape[3], v.shape[3], dtype=torch.float64), []
    for q_i, k_i, v_i, g_i in zip(*(x.split(250, 2) for x in (q, k, v, steps)), strict=True):
        outputs.append(reference.quadratic(q_i, k_i, v_i, g_i, initial_state=state))
        behind = torch.nn.functional.pad(g_i[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        state = torch.exp(g_i.sum(-1))[..., None, None] * state + (k_i * torch.exp(behind)[..., None]).mT @ v_i
    return torch.cat(outputs, 2)
