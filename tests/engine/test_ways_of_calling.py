"""PyTorch's ways of calling the operator: torch.func, forward mode, second derivatives, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import leetdist
from leetdist.reference import relative_error

pytestmark = pytest.mark.real_empty

DECAY = torch.tensor([-0.1, -0.5])


def inputs(tokens: int = 40, *, by_token: bool = False) -> list[Tensor]:
    """q, k, v of three calls, and a decay of each."""
    generator = torch.Generator().manual_seed(tokens)
    tensors = [torch.randn(3, 1, 2, tokens, 16, generator=generator) for _ in range(3)]
    if by_token:
        return [*tensors, -torch.rand(3, 1, 2, tokens, generator=generator)]
    return [*tensors, torch.stack([DECAY, 2 * DECAY, 3 * DECAY])]


def tiled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
    return leetdist.linear_attention(q, k, v, g, scale=0.3, **options)


def vanilla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
    return leetdist.linear_attention(q, k, v, g, scale=0.3, method="vanilla", **options)


def loss(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return function(*args).sin().sum()


ALL = (0, 1, 2, 3)
# What is asked of a function of (q, k, v, log_decay); on all three calls at once where `mapped`.
SINGLE: dict[str, Callable[..., Any]] = {
    "grad": lambda f: grad(lambda *x: loss(f, *x), ALL),
    "vjp": lambda f: lambda q, *x: vjp(lambda q: f(q, *x), q)[1](q),
    "jacrev": lambda f: jacrev(f, ALL),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "jvp": lambda f: lambda *x: jvp(lambda *y: f(*y, x[3], return_state=True), x[:3], x[:3])[1],
    "jvp of one": lambda f: lambda q, *x: jvp(lambda q: f(q, *x), (q,), (q,))[1],
}
MAPPED: dict[str, Callable[..., Any]] = {
    "vmap": lambda f: vmap(lambda q, k, v, g: f(q, k, v, DECAY)),
    "vmap over decays": vmap,
    "vmap over decays alone": lambda f: lambda q, k, v, g: vmap(f, (None, None, None, 0))(q[0], k[0], v[0], g),
    "vmap of documents": lambda f: vmap(
        lambda q, k, v, g: f(q, k, v, DECAY, cu_seqlens=torch.tensor([0, 1, q.shape[2]]), return_state=True)
    ),
    "vmap of documents, each its decay": lambda f: vmap(
        lambda q, k, v, g: f(q, k, v, g, cu_seqlens=torch.tensor([0, 1, q.shape[2]]), return_state=True)
    ),
    "vmap of states": lambda f: vmap(
        lambda q, k, v, g: f(q, k, v, DECAY, initial_state=k[:, :, :16].mT @ v[:, :, :16], return_state=True)
    ),
    "gradient a sample": lambda f: vmap(grad(lambda *x: loss(f, *x), ALL)),
    "gradient a sample, one decay": lambda f: lambda *x: vmap(
        grad(lambda *x: loss(f, *x), ALL), (0, 0, 0, None)
    )(*x[:3], DECAY),
    "gradient of vmap": lambda f: grad(lambda *x: loss(vmap(f), *x), ALL),
}  # fmt: skip


def check(transform: Callable[..., Any], args: list[Tensor], compiled: bool) -> None:
    found_by = transform(tiled)
    if compiled:
        found_by = torch.compile(found_by, backend="aot_eager", fullgraph=True)
    found, expected = found_by(*args), transform(vanilla)(*args)
    for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert relative_error(x, y) < 2e-6


HOWS = pytest.mark.parametrize(
    ("compiled", "by_token"),
    [(False, False), (True, False), (False, True)],
    ids=["eager", "compiled", "a decay a token"],
)


@HOWS
@pytest.mark.parametrize("name", SINGLE)
def test_torch_func(name: str, compiled: bool, by_token: bool) -> None:
    if compiled and name == "jacfwd" and torch.__version__ < (2, 10):
        pytest.skip("Dynamo of torch 2.9 traces no jacfwd, of any function")
    check(SINGLE[name], [x[0] for x in inputs(3 if "jac" in name else 40, by_token=by_token)], compiled)


@HOWS
@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name: str, compiled: bool, by_token: bool) -> None:
    check(MAPPED[name], inputs(by_token=by_token), compiled)


def test_vmap_is_a_larger_batch() -> None:
    q, k, v, _ = inputs()
    each = [tiled(*x, DECAY) for x in zip(q, k, v, strict=True)]
    assert torch.equal(vmap(lambda q, k, v: tiled(q, k, v, DECAY))(q, k, v), torch.stack(each))


def test_mapped_backward_has_the_bits_of_separate_ones() -> None:
    q, k, v, _ = inputs()
    leaf = q[0].clone().requires_grad_()
    o = tiled(leaf, k[0], v[0], DECAY)
    mapped = vmap(lambda do: torch.autograd.grad(o, leaf, do, retain_graph=True)[0])(v)
    assert torch.equal(mapped, torch.stack([torch.autograd.grad(o, leaf, do, retain_graph=True)[0] for do in v]))
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(o, leaf, v, is_grads_batched=True)


def test_dual_numbers() -> None:
    q, k, v, _ = (x[0] for x in inputs())
    with forward_ad.dual_level():
        o, tangent = forward_ad.unpack_dual(tiled(q, forward_ad.make_dual(k, v), v, DECAY))
    assert torch.equal(o, tiled(q, k, v, DECAY))
    assert relative_error(tangent, tiled(q, v, v, DECAY)) < 1e-6


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: hessian(lambda q, *x: loss(f, q, *x)),
        lambda f: grad(lambda q, *x: grad(lambda q: loss(f, q, *x))(q).sum()),
        lambda f: lambda *x: jvp(lambda g: f(*x[:3], g), (x[3],), (x[3],))[1],
    ],
    ids=["hessian", "grad of grad", "jvp of a decay"],
)
def test_what_is_refused_in_words(transform: Callable[..., Any], compiled: bool) -> None:
    function = transform(tiled)
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    args = [x[0] for x in inputs(3)]
    with pytest.raises(Exception, match=r"vanilla.*recursion"):
        function(*args)
    transform(vanilla)(*args)


@pytest.mark.parametrize("name", ["hvp", "vhp", "hessian", "jvp"])
def test_functional_second_derivatives(name: str) -> None:
    q, k, v, g = (x[0] for x in inputs(3))
    more = () if name == "hessian" else (q,)
    with pytest.raises(RuntimeError, match=r"differentiated once.*vanilla.*recursion"):
        getattr(functional, name)(lambda q: loss(tiled, q, k, v, g), q, *more)
    getattr(functional, name)(lambda q: loss(vanilla, q, k, v, g), q, *more)


@pytest.mark.parametrize("of", ["the same input", "another input"])
def test_gradient_penalty(of: str) -> None:
    """Also where the incoming gradient needs none: the second derivative is then not zero, and not dropped."""
    q, k, v, g = (x[0].clone().requires_grad_() for x in inputs())
    wanted = q if of == "the same input" else k
    (first,) = torch.autograd.grad(tiled(q, k, v, g).sum(), wanted, create_graph=True)
    assert torch.equal(first, torch.autograd.grad(tiled(q, k, v, g).sum(), wanted)[0])
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.norm().backward()


def test_fake_tensors_leave_nothing_behind() -> None:
    tokens = 533  # in no other test: nothing is remembered of it
    with FakeTensorMode():
        x = [torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3)]
        o, state = leetdist.linear_attention(*x, torch.tensor([-0.1, -0.2]), return_state=True)
        o.sum().backward()
    assert (o.shape, state.shape, x[0].grad.shape) == ((1, 2, tokens, 16), (1, 2, 16, 16), (1, 2, tokens, 16))
    x = [torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3)]
    leetdist.linear_attention(*x, torch.tensor([-0.1, -0.2])).sum().backward()
    assert torch.isfinite(x[0].grad).all()


def test_meta_tensors() -> None:
    x = [torch.empty(1, 2, 40, 16, device="meta", requires_grad=True) for _ in range(3)]
    decay = torch.empty(2, device="meta")
    o = leetdist.linear_attention(*x, decay)
    o.sum().backward()
    assert (o.device.type, o.shape, x[0].grad.shape) == ("meta", (1, 2, 40, 16), (1, 2, 40, 16))
    by_token = torch.empty(1, 2, 40, device="meta", requires_grad=True)
    leetdist.linear_attention(x[0][:, :1], *x[1:], by_token).sum().backward()
    assert by_token.grad.shape == (1, 2, 40)
    with pytest.raises(ValueError, match="k must have"):
        leetdist.linear_attention(x[0], x[1][..., :8], x[2], decay)


def test_dispatch_modes_see_the_op() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, g = (x[0] for x in inputs())
    with FlopCounterMode(display=False):
        assert torch.equal(tiled(q, k, v, g), tiled(q, k, v, g))


def step_loop(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for token in range(3):
        one = (x[:, :, token : token + 1] for x in (q, k, v))
        o, state = leetdist.linear_attention_step(*one, state, DECAY, scale=0.3)
        outputs.append(o)
    return torch.cat(outputs, 2), state


def steps(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    pool = state.repeat(3, 1, 1, 1)
    index, lengths = torch.tensor([2]), torch.tensor([3])
    o = leetdist.linear_attention_steps(q, k, v, pool, DECAY, scale=0.3, index=index, lengths=lengths)
    return o, pool


def by_token(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays that the graph computes, a token each: two tokens in steps of one, then all on a pool."""
    decay, pool = -k[..., 0].square(), state.detach().repeat(2, 1, 1, 1)
    for token in (0, 1):
        one = (x[:, :, token : token + 1] for x in (q, k, v))
        o, state = leetdist.linear_attention_step(*one, state, decay[:, :, token : token + 1], scale=0.3)
    leetdist.linear_attention_steps(q, k, v, pool, decay, scale=0.3, index=torch.tensor([1]))
    return o, state, pool


def step_in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return leetdist.linear_attention_step(*(x[:, :, :1] for x in (q, k, v)), state.clone(), DECAY, inplace=True)


def recursion(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Any:
    return leetdist.linear_attention(q, k, v, DECAY, initial_state=state, return_state=True, method="recursion")


def by_vanilla(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Any:
    return vanilla(q, k, v, DECAY, initial_state=state, return_state=True)


def decoder(name: str | None) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor]:
        return (leetdist.causal_linear_decoder(q, k, v, True, -DECAY, attn_method=name),)

    return call


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        step_loop,
        steps,
        by_token,
        step_in_place,
        recursion,
        by_vanilla,
        decoder(None),
        decoder("recursion"),
        decoder("vanilla"),
    ],
)
def test_fullgraph(call: Callable[..., Any], gradients: bool) -> None:
    q, k, v, _ = (x[0].requires_grad_(gradients) for x in inputs(3))
    args = (q, k, v, torch.randn(1, 2, 16, 16))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*args), call(*args)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    if expected[0].requires_grad:
        ours, theirs = (torch.autograd.grad(x[0].sin().sum(), (q, k, v)) for x in (found, expected))
        for x, y in zip(ours, theirs, strict=True):
            assert relative_error(x, y) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["auto", "block", "lightning", "fleet", "causal_dot_product", "vanilla"])
def test_deterministic_algorithms(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x = [torch.randn(1, 2, 300, 32, device="cuda", requires_grad=True) for _ in range(3)]
    decay = DECAY.cuda().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        o, state = leetdist.linear_attention(*x, decay, return_state=True, method=method)
        (o.sum() + state.sum()).backward()
        leetdist.linear_attention_step(*(y[:, :, :1] for y in x), state, decay)
    finally:
        torch.use_deterministic_algorithms(False)
    assert decay.grad.isfinite().all()


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("method", ["auto", "vanilla", "recursion"])
def test_tensors_of_inference_mode_beside_those_that_learn(method: str, by_token: bool) -> None:
    """Decays made in inference mode, and states that it has left: as good as any other, outside of it too."""
    plain = [x[0] for x in inputs(by_token=by_token)]
    with torch.inference_mode():
        k, v, g = (x.clone() for x in plain[1:])
        state = torch.ones(1, 2, 16, 16)

    def gradient(k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
        learnt = plain[0].clone().requires_grad_()
        leetdist.linear_attention(learnt, k, v, g, initial_state=state, method=method).sin().sum().backward()
        assert learnt.grad is not None
        return learnt.grad

    assert torch.equal(gradient(k, v, g, state), gradient(*plain[1:], torch.ones(1, 2, 16, 16)))
    last = [x[:, :, -1:] for x in (k, v)]
    learnt = plain[0][:, :, -1:].clone().requires_grad_()
    o, _ = leetdist.linear_attention_step(learnt, *last, state, g[..., -1:] if by_token else g)
    o.sum().backward()
