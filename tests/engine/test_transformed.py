"""torch.func and forward mode over what is around the operator: Mamba-2's scan, the convolution, layers, the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from channel_gate import ChannelGate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import leetdist
from leetdist.engine.call import apply_operator
from leetdist.operators.registry import register
from leetdist.reference import relative_error

pytestmark = pytest.mark.real_empty

TOKENS, HEADS, P, S = 9, 4, 4, 8
LIMITS = (0.1, 1.5)


def given(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "x": tensor(2, TOKENS, HEADS, P), "dt": tensor(2, TOKENS, HEADS), "A": -tensor(HEADS).abs(),
        "B": tensor(2, TOKENS, 2, S), "C": tensor(2, TOKENS, 2, S), "D": tensor(HEADS),
        "z": tensor(2, TOKENS, HEADS, P), "dt_bias": tensor(HEADS),
    }  # fmt: skip


def scan(**tensors: Tensor) -> Tensor:
    return leetdist.mamba_chunk_scan_combined(**tensors, dt_softplus=True, dt_limit=LIMITS)


def scan_of(name: str) -> Callable[[Tensor], Tensor]:
    others = given()
    return lambda x: scan(**(others | {name: x}))


WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


def conv(x: Tensor, weight: Tensor = WEIGHT, bias: Tensor | None = None) -> Tensor:
    seq_idx = torch.arange(TOKENS).expand(2, TOKENS) // 5
    return leetdist.nn.causal_conv1d(x, weight, bias, activation="silu", seq_idx=seq_idx)


X = torch.randn(2, TOKENS, 6, generator=torch.Generator().manual_seed(6))
# What is differentiated, and by what.
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    **{f"scan by {name}": (scan_of(name), x) for name, x in given().items()},
    "conv by x": (conv, X),
    "conv by weight": (lambda w: conv(X, w), torch.randn(6, 4, generator=torch.Generator().manual_seed(7))),
    "conv by bias": (lambda b: conv(X, WEIGHT, b), torch.ones(6)),
    "loss": (lambda x: leetdist.reduce_loss(x.sum(), 3, None), X),
}  # fmt: skip


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(x).sin().sum(), x)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    function, x = CALLS[name]

    def loss(x: Tensor) -> Tensor:
        return function(x).sin().sum()

    expected = by_autograd(function, x)
    assert relative_error(grad(loss)(x), expected) < 2e-6
    assert relative_error(vjp(loss, x)[1](torch.ones(()))[0], expected) < 2e-6
    assert relative_error(jacrev(loss)(x), expected) < 2e-6


@pytest.mark.parametrize("name", CALLS)
def test_mapped_calls_have_the_bits_of_single_ones(name: str) -> None:
    function, x = CALLS[name]
    many = torch.stack([x, 0.5 * x, 0.25 * x])
    assert torch.equal(vmap(function)(many), torch.stack([function(x) for x in many]))
    each = vmap(grad(lambda x: function(x).sin().sum()))(many)
    for found, x in zip(each, many, strict=True):
        assert relative_error(found, by_autograd(function, x)) < 2e-6


def test_losses_of_samples_with_counts_of_their_own() -> None:
    """The number of tokens is mapped too."""
    losses, counts = torch.randn(3, 5), (torch.arange(5) < torch.tensor([[1], [5], [3]])).float()

    def loss(x: Tensor, kept: Tensor) -> Tensor:
        return leetdist.reduce_loss((x * kept).sum(), kept.sum(), None)

    expected = (losses * counts).sum(1) / counts.sum(1)
    torch.testing.assert_close(vmap(loss)(losses, counts), expected)
    torch.testing.assert_close(vmap(grad(loss))(losses, counts), counts / counts.sum(1, keepdim=True))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("scan by dt", "scan by A", "scan by dt_bias")])
def test_forward_mode(name: str) -> None:
    function, x = CALLS[name]
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    y, found = jvp(function, (x,), (tangent,))
    assert torch.equal(y, function(x))
    assert relative_error((found * y.cos()).sum(), (by_autograd(function, x) * tangent).sum()) < 1e-5
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
        assert torch.equal(dual.primal, y)
        assert torch.equal(dual.tangent, found)
        assert torch.equal(function(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_same_bits_in_other_dtypes(dtype: torch.dtype) -> None:
    tensors = {name: x.to(dtype) for name, x in given().items()}
    for left_out in ((), ("z",), ("D", "z"), ("D",)):
        kept = {name: x for name, x in tensors.items() if name not in left_out}
        y, _ = vjp(lambda x, kept=kept: scan(**kept | {"x": x}), tensors["x"])
        assert torch.equal(y, scan(**kept))
    x, w = X.to(dtype), torch.randn(6, 4)
    assert torch.equal(vjp(lambda x: conv(x, w), x)[0], conv(x, w))


def test_jvp_of_a_decay_is_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match="leetdist: forward-mode"):
        jacfwd(scan_of("A"))(given()["A"])


@pytest.mark.parametrize(
    "kind", [leetdist.nn.LightningAttention, leetdist.nn.Retention, leetdist.nn.SimpleGLA, leetdist.nn.Mamba2]
)
def test_gradients_a_sample(kind: Any) -> None:
    layer = kind(32, 2, 32) if kind is leetdist.nn.Mamba2 else kind(32, 2)
    x, parameters = torch.randn(3, 1, TOKENS, 32), dict(layer.named_parameters())
    found = vmap(grad(lambda p, x: functional_call(layer, p, (x,)).sin().sum()), (None, 0))(parameters, x)
    for sample, one in enumerate(x):
        layer.zero_grad()
        layer(one).sin().sum().backward()
        for name, parameter in parameters.items():
            assert relative_error(found[name][sample], parameter.grad) < 1e-5, name


@pytest.mark.parametrize("name", ["scan by x", "scan by z", "conv by x"])
def test_a_backward_pass_that_is_mapped_is_refused_in_words(name: str) -> None:
    function, x = CALLS[name]
    x = x.clone().requires_grad_()
    y = function(x)
    with pytest.raises(RuntimeError, match="leetdist: is_grads_batched"):
        torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)


OVER_RANKS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "gather_sequence": lambda x, group: leetdist.gather_sequence(x, 1, group),
    "halo": lambda x, group: leetdist.halo(x, 1, group, width=1),
    "causal_conv1d": lambda x, group: leetdist.nn.causal_conv1d(x, torch.ones(6, 4), group=group),
    "reduce_loss": lambda x, group: leetdist.reduce_loss(x.sum(), 1, group),
}  # fmt: skip


def scan_over_ranks(x: Tensor, group: Any) -> Tensor:
    dt, a = torch.full((*x.shape[:2], 2), 0.3), -torch.ones(2)
    x = x.unflatten(2, (2, 3))
    return leetdist.mamba_chunk_scan_combined(x, dt, a, x[:, :, :1], x[:, :, 1:], group=group)


@pytest.mark.parametrize("name", ["gather_sequence", "halo", "causal_conv1d", "scan"])
def test_a_backward_pass_over_ranks_is_mapped(name: str) -> None:
    """One gradient by one, on all ranks."""

    def rank(group: Any) -> None:
        x = leetdist.shard_sequence(torch.ones(2, 48, 6), 1, group).clone().requires_grad_()
        y = scan_over_ranks(x, group) if name == "scan" else OVER_RANKS[name](x, group)
        dy = torch.randn(3, *y.shape)
        found = vmap(lambda one: torch.autograd.grad(y, x, one, retain_graph=True)[0])(dy)
        each = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in dy]
        assert torch.equal(found, torch.stack(each))

    leetdist.virtual_ranks(rank, 3)


@pytest.mark.parametrize("name", OVER_RANKS)
def test_over_ranks_is_refused_in_words(name: str) -> None:
    def rank(group: Any) -> str:
        with pytest.raises(RuntimeError, match=r"leetdist: .* is differentiated by autograd only") as error:
            grad(lambda x: OVER_RANKS[name](x, group).sum())(X)
        return str(error.value)

    assert len(leetdist.virtual_ranks(rank, 2)) == 2


@pytest.mark.parametrize("name", OVER_RANKS)
def test_over_ranks_beside_forward_mode(name: str) -> None:
    """A level of forward mode that none of a call's tensors is in leaves its backward pass as it was."""

    def rank(group: Any) -> Tensor:
        return by_autograd(lambda x: OVER_RANKS[name](x, group), (group.rank + 1) * X)

    expected = leetdist.virtual_ranks(rank, 2)
    with forward_ad.dual_level():
        found = leetdist.virtual_ranks(rank, 2)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_forward_mode_by_weights_over_ranks_is_refused_in_words() -> None:
    def rank(group: Any) -> None:
        with pytest.raises(RuntimeError, match="leetdist: causal_conv1d over ranks is differentiated by autograd"):
            leetdist.nn.causal_conv1d(X, weight, group=group)

    with forward_ad.dual_level():
        weight = forward_ad.make_dual(WEIGHT, torch.ones_like(WEIGHT))
        leetdist.virtual_ranks(rank, 2)


def test_operators() -> None:
    """Those of a decay as `linear_attention` is; others have no rules."""
    q, decay = torch.randn(1, 2, 20, 8), {"log_decay": -torch.ones(2)}
    found = grad(lambda q: apply_operator("constant_decay", q, q, q, decay).sum())(q)
    leaf = q.clone().requires_grad_()
    leetdist.linear_attention(leaf, leaf, leaf, decay["log_decay"]).sum().backward()
    assert relative_error(found, leaf.grad) < 1e-6
    register("gate of transforms", ChannelGate)
    gate = {"g": -torch.ones(1, 2, 20, 8)}
    with pytest.raises(RuntimeError, match="leetdist: operator 'gate of transforms' is differentiated by"):
        grad(lambda q: apply_operator("gate of transforms", q, q, q, gate).sum())(q)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    layer = leetdist.nn.Mamba2(32, head_dim=8, state=8)
    rows, tokens = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("tokens", min=2, max=1000)
    short = torch.randn(2, 20, 32)
    exported = torch.export.export(layer, (short,), dynamic_shapes=({0: rows, 1: tokens},), strict=strict).module()
    for x in (short, torch.randn(3, 33, 32)):
        assert relative_error(exported(x), layer(x)) < 1e-6


def token() -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(3, 1, 2, 1, 8, generator=generator) for _ in range(3))
    return [q, k, v, torch.randn(3, 1, 2, 8, 8, generator=generator), -torch.rand(3, 2, generator=generator)]


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    return leetdist.linear_attention_step(q, k, v, state, decay)


def steps(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor) -> Tensor:
    return leetdist.linear_attention_steps(q, k, v, state.clone(), decay)


def decoded(exponent: bool) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, _: Tensor, decay: Tensor) -> Tensor:
        gamma = -decay if exponent else decay.exp()
        return leetdist.causal_linear_decoder(q, k, v, True, gamma, exponent)

    return call


@pytest.mark.parametrize("call", [step, steps, decoded(True), decoded(False)])
def test_tokens_are_mapped(call: Callable[..., Any]) -> None:
    args = token()
    found, each = vmap(call)(*args), [call(*one) for one in zip(*args, strict=True)]
    if call is step:
        expected = tuple(map(torch.stack, zip(*each, strict=True)))
    else:
        expected = torch.stack(each)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call", [step, decoded(True), decoded(False)])
@pytest.mark.parametrize("by", [0, 1, 2, 4])
def test_gradients_of_tokens(call: Callable[..., Any], by: int) -> None:
    args = [x[0] for x in token()]

    def loss(x: Tensor) -> Tensor:
        found = call(*args[:by], x, *args[by + 1 :])
        return (found[0] if isinstance(found, tuple) else found).sin().sum()

    leaf = args[by].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf, materialize_grads=True)
    torch.testing.assert_close(grad(loss)(args[by]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call", [step, steps, decoded(True), decoded(False)])
@pytest.mark.parametrize("of", ["meta", "fake"])
def test_tokens_without_numbers(call: Callable[..., Any], of: str) -> None:
    args = [x[0] for x in token()]
    if of == "meta":
        found = call(*(x.to("meta") for x in args))
    else:
        with FakeTensorMode() as mode:
            found = call(*(mode.from_tensor(x) for x in args))
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, call(*args)))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


def test_what_a_call_without_numbers_would_do() -> None:
    q, decay = torch.empty(1, 2, 1000, 64), -torch.ones(2)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert "tile     128 tokens" in leetdist.explain(fake, fake, fake, mode.from_tensor(decay))


def test_operators_of_fake_tensors_leave_nothing_behind() -> None:
    register("gate of fakes", ChannelGate)
    tokens = 533  # in no other test: nothing is remembered of it

    def call() -> Tensor:
        q, g = torch.randn(1, 2, tokens, 8), -torch.rand(1, 2, tokens, 8)
        found: Any = apply_operator("gate of fakes", q, q, q, {"g": g}, cu_seqlens=torch.tensor([0, 100, tokens]))
        return found

    with FakeTensorMode():
        with contextlib.suppress(Exception):  # offsets have no values there
            call()
        q = torch.randn(1, 2, tokens, 8)
        apply_operator("gate of fakes", q, q, q, {"g": -torch.rand(1, 2, tokens, 8)})
    assert torch.isfinite(call()).all()


@pytest.mark.parametrize("method", ["vanilla", "recursion"])
def test_meta_tensors_of_methods_on_one_device(method: str) -> None:
    q = torch.empty(1, 2, 20, 8, device="meta", requires_grad=True)
    o, state = leetdist.linear_attention(q, q, q, torch.empty(2, device="meta"), method=method, return_state=True)
    assert (o.shape, state.shape, o.device.type) == (q.shape, (1, 2, 8, 8), "meta")
    with pytest.raises(ValueError, match="k must have q's dtype"):
        leetdist.linear_attention(q, q.half(), q, method=method)
