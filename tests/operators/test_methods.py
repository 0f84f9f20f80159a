"""Every method against the same fp64 oracle, and against itself on ranks; LeetDecoding's entry point; "auto"."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import leetdist
from leetdist import reference
from leetdist.decoder import METHOD_OF
from leetdist.engine.checks import METHODS, ONE_DEVICE, describe
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch.fleet import ConstantPowers, decayed_cumsum
from leetdist.kernels.constant_decay.pytorch.token_walk import TokenWalk
from leetdist.operators import cost
from leetdist.operators.composition import part_of_tile
from leetdist.testing.equality import Case, check
from oracle import BOUNDS, assert_matches_oracle, differing

CPU = torch.device("cpu")
SHARDED = [method for method in METHODS if method not in ("auto", *ONE_DEVICE)]

# Odd lengths, Dk != Dv, with decay and without; lightning's blocks are 256 tokens, recursion's leaves 64.
TABLE = [
    Case(1, 8, 16, heads=2, initial=True),
    Case(77, 24, 8, heads=4, kv_heads=2, decay="mixed", batch=2, scale=0.5, initial=True, tile=32),
    Case(131, 16, 40, heads=2, decay="none", model_layout=True),
    Case(129, 12, 12, heads=2, decay="slow", documents=(0, 1, 1, 65, 129), initial=True, scale=2.0),
    Case(100, 8, 12, heads=6, decay="extreme", initial=True, tile=32),
    Case(77, 24, 8, heads=4, q_heads=2, kv_heads=1, v_heads=4, decay="tokens", batch=2, initial=True, tile=32),
    Case(129, 12, 12, heads=2, decay="restarts", documents=(0, 1, 1, 65, 129), initial=True, scale=2.0),
]
LONG = [
    Case(601, 8, 12, heads=2, decay="slow", tile=512, scale=0.3, initial=True),
    Case(530, 8, 8, heads=3, decay="mixed", tile=512),
    Case(601, 8, 12, heads=2, decay="restarts", tile=512, scale=0.3, initial=True),
]


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", TABLE, ids=str)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "block")])
def test_table(method: str, case: Case, dtype: torch.dtype, seed: int) -> None:
    assert_matches_oracle(replace(case, method=method, dtype=dtype), CPU, seed)


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("method", ["vanilla", "recursion", "lightning", "fleet", "causal_dot_product"])
def test_long_tiles(method: str, case: Case, seed: int) -> None:
    assert_matches_oracle(replace(case, method=method), CPU, seed)


@pytest.mark.parametrize("method", SHARDED)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_device(method: str, ranks: int, seed: int) -> None:
    cases = [
        Case(300, 16, 24, heads=2, initial=True, uneven=True, tile=32, scale=0.5),
        Case(150, 8, 8, heads=2, documents=(0, 20, 20, 97, 150), initial=True, tile=16, decay="mixed"),
        Case(150, 8, 12, heads=4, q_heads=2, decay="tokens", batch=2, initial=True, tile=16, uneven=True),
        Case(150, 8, 8, heads=2, documents=(0, 20, 20, 97, 150), tile=16, decay="restarts"),
    ]
    if method == "lightning":
        cases += [Case(2100, 8, 8, heads=1, tile=512, decay=decay) for decay in ("lightning", "tokens")]
    for case in cases:
        assert not differing(replace(case, method=method), ranks, CPU, seed)


@pytest.mark.parametrize("method", SHARDED)
def test_a_larger_batch_changes_no_bit(method: str) -> None:
    q, k, v = (torch.randn(3, 2, 90, 16) for _ in range(3))
    for log_decay in (torch.tensor([-0.1, -0.01]), -torch.rand(3, 2, 90)):
        together = leetdist.linear_attention(q, k, v, log_decay, method=method, tile=32)
        own = log_decay[1:2] if log_decay.ndim == 3 else log_decay
        alone = leetdist.linear_attention(q[1:2], k[1:2], v[1:2], own, method=method, tile=32)
        assert torch.equal(together[1:2], alone)


@pytest.mark.interpreter
@pytest.mark.parametrize("method", ["fleet", "lightning"])
def test_interpreted(method: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LEETDIST_BACKEND", "triton")
    if method == "lightning":
        assert_matches_oracle(Case(530, 16, 16, heads=1, tile=512, decay="slow", method=method), CPU, seed)
        return
    for case in (
        Case(37, 17, 24, heads=2, kv_heads=1, decay="mixed", initial=True, tile=16, scale=0.5),
        Case(30, 16, 16, heads=1, decay="slow", documents=(0, 9, 9, 30), tile=16),
        Case(20, 16, 16, heads=6, decay="extreme", initial=True, tile=16),
    ):
        assert_matches_oracle(replace(case, method=method), CPU, seed)


@pytest.fixture(params=[None, "triton"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, with the backend that is chosen there and with Triton."""
    if request.param is not None:
        monkeypatch.setitem(os.environ, "LEETDIST_BACKEND", request.param)
    return torch.device("cuda")


# Few head sizes, and a test a dtype or number of ranks: Triton compiles for seconds each.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", SHARDED)
def test_on_a_gpu(method: str, dtype: torch.dtype, cuda: torch.device, seed: int) -> None:
    for case in (
        Case(3000, 128, 128, batch=2, decay="mixed", initial=True, scale=0.5),
        Case(1300, 128, 128, heads=2, decay="none", model_layout=True),
        Case(700, 128, 128, heads=4, kv_heads=2, decay="slow", documents=(0, 1, 1, 65, 700), tile=512),
        Case(260, 256, 200, heads=2),
        Case(300, 128, 128, heads=6, decay="extreme", initial=True),
        Case(700, 128, 128, heads=4, q_heads=1, kv_heads=2, v_heads=4, decay="slow", initial=True, tile=512),
        Case(700, 128, 128, heads=4, q_heads=1, kv_heads=2, v_heads=4, decay="tokens", initial=True, tile=512),
        Case(700, 128, 128, heads=2, decay="restarts", documents=(0, 1, 1, 65, 700), tile=512),
    ):
        assert_matches_oracle(replace(case, method=method, dtype=dtype), cuda, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("method", SHARDED)
def test_virtual_ranks_on_a_gpu(method: str, ranks: int, cuda: torch.device, seed: int) -> None:
    for case in (
        Case(9000, 128, 128, uneven=True),
        Case(999, 128, 128, documents=(0, 7, 700, 999)),
        Case(5000, 128, 128, uneven=True, decay="tokens"),
    ):
        assert not differing(replace(case, method=method), ranks, cuda, seed)


@pytest.mark.gpu
def test_fleet_is_accurate_over_131072_tokens() -> None:
    q, k, v = (torch.randn(1, 4, 131_072, 128, device="cuda") for _ in range(3))
    log_decay = torch.tensor([-1.0, -0.01, -1e-4, 0.0], device="cuda")
    rows = torch.tensor([0, 1, 4095, 4096, 70_000, 131_071], device="cuda")
    o = leetdist.linear_attention(q, k, v, log_decay, method="fleet")
    for head in range(4):
        one = slice(head, head + 1)
        exact = reference.quadratic(q[:, one], k[:, one], v[:, one], log_decay[one], rows=rows)
        assert reference.relative_error(o[:, one, rows], exact) <= 1e-6, f"head {head}"


def test_sums_one_by_one_are_short(seed: int) -> None:
    """In fp32, a sum of 8,192 terms one after the other is off by 2e-6: a tile is computed in parts, on its grid."""
    for tile, part in ((8192, 512), (512, 512), (96, 96), (1536, 512), (1000, 500), (1009, 1009)):
        assert part_of_tile(512, tile) == part
        assert part_of_tile(None, tile) == tile
    q, k, v = (torch.randn(1, 1, 8192, 8) for _ in range(3))
    o = leetdist.linear_attention(q, k, v, method="causal_dot_product", tile=8192)
    rows = torch.arange(8000, 8192)
    assert reference.relative_error(o[:, :, rows], reference.quadratic(q, k, v, rows=rows)) <= 1e-6
    case = Case(2100, 8, 8, heads=1, tile=1024, method="causal_dot_product")
    assert not differing(case, 3, CPU, seed)


@pytest.mark.parametrize("method", ["causal_dot_product", "fleet"])
def test_slow_decays_do_not_drift(method: str) -> None:
    """gamma = exp(-1e-4), rounded to fp32 and applied 4,096 times, is wrong by 5e-5."""
    q, k, v = (torch.rand(1, 1, 4096, 4) for _ in range(3))
    log_decay = torch.tensor([-1e-4])
    rows = torch.tensor([4000, 4095])
    o = leetdist.linear_attention(q, k, v, log_decay, method=method, tile=4096)
    exact = reference.quadratic(q, k, v, log_decay, rows=rows)
    assert reference.relative_error(o[:, :, rows], exact) <= 1e-6


def test_decayed_cumsum_never_overflows() -> None:
    """The textbook form divides by gamma^t, which is 0 in fp32 after two tokens here."""
    x = torch.randn(1, 1, 100, 3)

    def powers(log_decay: float) -> ConstantPowers:
        return ConstantPowers(torch.tensor([log_decay]), TokenWalk(Tiles(100, (0, 100)), CPU, False), x.dtype)

    torch.testing.assert_close(decayed_cumsum(x[:, :, None], powers(-60.0))[:, :, 0], x)
    exact = torch.stack([x[0, 0, : t + 1].double().sum(0) for t in range(100)])
    assert reference.relative_error(decayed_cumsum(x[:, :, None], powers(0.0))[0, 0, 0], exact) < 1e-6


@pytest.mark.parametrize("method", ONE_DEVICE)
def test_one_device_methods_refuse_a_group(method: str) -> None:
    x = torch.randn(1, 1, 32, 8)

    def rank(group: leetdist.sequence.virtual.VirtualGroup) -> None:
        leetdist.linear_attention(x, x, x, method=method, group=group)

    for ranks in (1, 2):
        with pytest.raises(ValueError, match=f"{method}.*one device.*block.*lightning.*fleet"):
            leetdist.virtual_ranks(rank, ranks)


@pytest.mark.parametrize("method", ONE_DEVICE)
def test_one_device_methods_differentiate_twice(method: str) -> None:
    q, k, v = (torch.randn(1, 1, 70, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    assert torch.autograd.gradgradcheck(lambda k: leetdist.linear_attention(q, k, v, method=method)[:, :, -1], (k,))


@pytest.mark.parametrize("name", METHOD_OF)
@pytest.mark.parametrize("is_need_exp", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_causal_linear_decoder(name: str, is_need_exp: bool, dtype: torch.dtype) -> None:
    """One meaning for every name, dtype, batch and length; in LeetDecoding it changes with each of them."""
    for batch, tokens in ((1, 33), (2, 140)):
        q, k, v = (torch.randn(batch, 3, tokens, dim).to(dtype) for dim in (8, 8, 12))
        gamma = torch.tensor([0.0, 0.4, 1.0]).to(dtype)
        o = leetdist.causal_linear_decoder(q, k, v, True, gamma, is_need_exp, name)
        log_decay = -gamma if is_need_exp else torch.log(gamma.double()).clamp(min=-1e6)
        exact = reference.recurrence(q, k, v, log_decay)[0]
        assert o.dtype == dtype
        assert reference.relative_error(o, exact) < BOUNDS[dtype]


def test_causal_linear_decoder_without_decay_and_with_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    exact = reference.recurrence(q, k, v)[0]
    assert reference.relative_error(leetdist.causal_linear_decoder(q, k, v), exact) < 1e-6
    for is_need_exp, power in ((True, lambda x: -x), (False, torch.log)):
        ours = torch.tensor([0.3, 0.9], requires_grad=True)
        theirs = ours.detach().double().requires_grad_()
        leetdist.causal_linear_decoder(q, k, v, True, ours, is_need_exp).square().sum().backward()
        reference.recurrence(q, k, v, power(theirs))[0].square().sum().backward()
        assert reference.relative_error(ours.grad, theirs.grad) < 1e-5


def test_causal_linear_decoder_sees_gamma_change_in_place() -> None:
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    gamma = torch.tensor([0.1])
    before = leetdist.causal_linear_decoder(q, k, v, True, gamma)
    again = leetdist.causal_linear_decoder(q, k, v, True, gamma, False)
    assert not torch.equal(before, again)
    gamma.fill_(1.0)
    assert not torch.equal(before, leetdist.causal_linear_decoder(q, k, v, True, gamma))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": torch.ones(2)}, "is_mask_weight must be True"),
        ({"is_mask_weight": True}, "gamma must be a floating tensor of shape"),
        ({"is_mask_weight": True, "gamma": torch.ones(3)}, r"shape \(H,\) = \(2,\)"),
        ({"is_mask_weight": True, "gamma": -torch.ones(2)}, "gamma must be at least 0"),
        ({"is_mask_weight": True, "gamma": 2 * torch.ones(2), "is_need_exp": False}, "gamma must be from 0 to 1"),
        ({"attn_method": "flash"}, "attn_method must be one of vanilla"),
    ],
)
def test_causal_linear_decoder_refuses(arguments: dict[str, object], message: str) -> None:
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        leetdist.causal_linear_decoder(q, k, v, **arguments)


def test_auto_is_the_same_for_any_batch_and_number_of_ranks(seed: int) -> None:
    def chosen(batch: int) -> str:
        x = torch.randn(batch, 2 * batch, 200 * batch, 16, requires_grad=batch > 1)
        return leetdist.explain(x, x, x, tile=64).splitlines()[1]

    assert chosen(1) == chosen(5)
    case = Case(200, 16, 16, method="auto", tile=32)
    assert not [d for found in leetdist.virtual_ranks(lambda g: check(case, g, CPU, seed), 2) for d in found]


def test_costs_cover_every_problem() -> None:
    for where, costs in cost.COSTS.items():
        assert set(costs) == {True, False}, where
        for table in costs.values():
            assert set(table) == set(cost.SHARDED), where
            assert all(c.seconds(32, 128, 16, 1.0) < c.seconds(32, 100_000, 4096, 1.0) for c in table.values()), where


def test_auto_takes_the_least_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 64, 16)
    options = {"scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "tile": None}
    problem = describe(x, x, x, None, method="auto", **options)
    table = {name: cost.Cost(5.0, 0.0, 1.0) for name in cost.SHARDED} | {"fleet": cost.Cost(1.0, 0.0, 2.0)}
    monkeypatch.setitem(cost.COSTS["cpu"], False, table)
    assert cost.choose(problem, 16, where="cpu", token_scan=True).method == "fleet"
    assert cost.choose(problem, 4096, where="cpu", token_scan=True).method == "block"


def test_auto_on_a_gpu_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 1, 1, 128)
    options = {"scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "tile": None}
    problem = replace(describe(x, x, x, None, method="auto", **options), device=torch.device("cuda", 0))
    table = {name: cost.Cost(5.0, 0.0, 3.0) for name in cost.SHARDED} | {"fleet": cost.Cost(5.0, 0.0, 2.0)}
    monkeypatch.setitem(cost.COSTS["sm_90"], False, table)
    assert cost.choose(problem, 4096, where="sm_90", token_scan=True).method == "fleet"
    assert cost.choose(problem, 4096, where="sm_90", token_scan=False).method == "block"
    # Without the kernels for Hopper, fp32 products of matrices are slower than the CUDA cores.
    assert cost.choose(problem, 4096, where="general", token_scan=True).method == "fleet"


def test_auto_is_never_far_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host bounds one batch entry, and the device sixteen: what is a little slower there may be far faster here."""
    x = torch.empty(1, 1, 1, 128)
    options = {"scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "tile": None}
    problem = describe(x, x, x, None, method="auto", **options)
    table = {name: cost.Cost(100.0, 0.0, 100.0) for name in cost.SHARDED}
    monkeypatch.setitem(cost.COSTS["cpu"], False, table | {"fleet": cost.Cost(110.0, 0.0, 50.0)})
    choice = cost.choose(problem, 16, where="cpu", token_scan=True)
    assert choice.method == "fleet"
    assert choice.ratios["fleet"] == pytest.approx(1.1)
    assert choice.ratios["block"] > 1.5
    # In tiles that are no longer than its blocks, lightning is block, whatever was measured.
    assert "lightning" not in choice.ratios
    assert "lightning" in cost.choose(problem, 2 * cost.LIGHTNING_BLOCK, where="cpu", token_scan=True).ratios


@pytest.mark.parametrize("method", ["vanilla", "recursion"])
def test_a_decay_a_token_is_differentiable_twice(method):
    q, k, v = (torch.randn(1, 1, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    decay = (-torch.rand(1, 1, 5, dtype=torch.float64)).requires_grad_()

    def last(*given):
        return leetdist.linear_attention(*given, method=method)[:, :, -1]

    assert torch.autograd.gradgradcheck(last, (q, k, v, decay), fast_mode=True)
