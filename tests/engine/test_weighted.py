"""v and a weight a token as an operator's inputs, so that nobody need write their product: the bits are the product's,
whoever multiplies. A stand-in in PyTorch takes both, as the kernels for Hopper do."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from helpers import forget_kernels
from leetdist.engine import planning, repeats
from leetdist.engine.call import run
from leetdist.kernels.runtime.settings import Settings
from leetdist.kernels.token_decay.pytorch import block
from leetdist.operators.choice import Use
from leetdist.operators.dispatch import choose
from leetdist.operators.facts import Facts, Machine
from leetdist.operators.implementations import CANDIDATES, Implementation
from leetdist.reference import relative_error
from leetdist.sequence.group import resolve

NAME, TILE, TOKENS = "leetdist.kernels.token_decay.stand_in", 32, 200
OPTIONS: dict[str, Any] = {
    "scale": 0.5, "method": "auto", "initial_state": None, "return_state": False, "cu_seqlens": None, "tile": TILE,
    "precision": None,
}  # fmt: skip
weighed: list[str] = []


def tile_states(b: Tensor, c: Tensor, *args: Any, weight: Tensor | None = None, **options: Any) -> Tensor:
    assert (weight is None) == options["reverse"]
    return block.tile_states(b, c if weight is None else product("states", c, weight), *args, **options)


def tile_outputs(
    a: Tensor, b: Tensor, c: Tensor, *args: Any, weight: Tensor, skip: Tensor | None = None, **options: Any
) -> Tensor:
    o = block.tile_outputs(a, b, product("outputs", c, weight), *args, **options)
    if skip is not None:
        weighed.append("skipped")
        o += c * skip.view(len(skip), 1, -1)
    return o


def early_gradients(q, k, v, do, states, log_decay, tiles, *, scale, out, weight=None):
    options: dict[str, Any] = {"reverse": False, "scale": scale, "state_scale": scale, "out_dtype": q.dtype}
    return block.tile_outputs(do, product("early", v, weight), k, states.mT, log_decay, tiles, out=out, **options), {}


def late_gradients(q, k, x, do, states, ends, log_decay, tiles, kept, *, scale, outs, weight=None, skip=None):
    v = product("late", x, weight)
    options: dict[str, Any] = {"reverse": True, "scale": scale, "state_scale": 1.0, "out_dtype": q.dtype}
    dk = block.tile_outputs(v, do, q, ends.mT, log_decay, tiles, **options)
    dv = block.tile_outputs(k, q, do, ends, log_decay, tiles, **options)
    grads = [dk, dv, block.decay_gradient(q, k, v, do, states, ends, log_decay, tiles, scale=scale)]
    if len(outs) > 3:
        assert weight is not None
        grads[1:] = [dv * weight[..., None], grads[2], (dv * x).sum(3)]
    if skip is not None:
        grads[1:] = [grads[1] + do * skip[:, None, None], *grads[2:], (do * x).sum(3)]
    for out, grad in zip(outs, grads, strict=True):
        for begin, length in tiles.spans if out is not None else ():  # where other tiles have theirs already
            out[:, :, begin : begin + length] = grad[:, :, begin : begin + length]
    return tuple(grad if out is None else out for out, grad in zip(outs, grads, strict=True))


def product(step: str, v: Tensor, weight: Tensor | None) -> Tensor:
    weighed.append(step if weight is not None else "written")
    return v if weight is None else block.weighted_values(v, weight)


def weighted_values(v: Tensor, weight: Tensor) -> None:
    weighed.append("not written")


@pytest.fixture(params=["PyTorch", "stand-in"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "stand-in":
        module = types.ModuleType(NAME)
        steps = tile_states, tile_outputs, early_gradients, late_gradients, weighted_values
        for function in steps:
            monkeypatch.setattr(module, function.__name__, function, raising=False)
        monkeypatch.setitem(sys.modules, NAME, module)
        who = Implementation("stand-in", "stand_in", lambda facts: None, operator="token_decay", weighs=True)
        weigher = replace(who, refusal=lambda facts: None if facts.weighs else "nobody takes weights")
        for step in (function.__name__ for function in steps[:-1]):
            monkeypatch.setitem(CANDIDATES, step, (who,))
        for step in ("weighted_values", "skipped_outputs"):
            monkeypatch.setitem(CANDIDATES, step, (weigher, *PYTORCH[step]))
    forget_kernels()
    weighed.clear()
    yield request.param
    forget_kernels()


def draw(heads: int = 4) -> list[Tensor]:
    q, k, v, do = (torch.randn(2, own, TOKENS, 8) for own in (2, heads, heads, heads))
    return [q, k, v, do, -torch.rand(2, heads, TOKENS), torch.rand(2, heads, TOKENS)]


def with_gradients(given: list[Tensor], own: slice = slice(None), **more: Any) -> list[Tensor]:
    """o and the gradients of q, k, v and log_decay; without a weight, of what v is already the product."""
    q, k, v, do, g, *weight = (x[:, :, own] for x in given)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
    if weight:
        o, _ = run(tuple(leaves), OPTIONS, resolve(more.get("group")), weight=weight[0])  # type: ignore[arg-type]
    else:
        o = leetdist.linear_attention(*leaves, scale=OPTIONS["scale"], tile=TILE, **more)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_bits_of_the_product_on_ranks(kernels: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, bounds = draw(), {1: [0, 200], 3: [0, 64, 64, 200]}[ranks]
    monkeypatch.setenv("LEETDIST_LANES", "2" if ranks > 1 else "1")
    parts = leetdist.virtual_ranks(
        lambda group: with_gradients(given, slice(bounds[group.rank], bounds[group.rank + 1]), group=group), ranks
    )
    found = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
    stood_in = {"states", "outputs", "early", "late", "not written"} if kernels == "stand-in" else set()
    assert set(weighed) == stood_in
    with pytest.MonkeyPatch.context() as patch:  # the same product by PyTorch's kernels
        for step, candidates in PYTORCH.items():
            patch.setitem(CANDIDATES, step, candidates)
        forget_kernels()
        q, k, v, do, g, weight = given
        expected = with_gradients([q, k, block.weighted_values(v, weight), do, g])
    if kernels == "stand-in":  # v's own gradient, beside which the weight has one
        expected[3] = expected[3] * weight[..., None]
    for name, x, y in zip(("o", "dq", "dk", "dv", "dg"), found, expected, strict=True):
        assert torch.equal(x, y), name


PYTORCH = dict(CANDIDATES)


def test_forward_alone(kernels: str) -> None:
    q, k, v, _, g, weight = draw()
    o, _ = run((q, k, v, g), OPTIONS, None, weight=weight)
    assert set(weighed) == ({"states", "outputs", "not written"} if kernels == "stand-in" else set())
    assert o.shape == v.shape


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("columns", [(), (8,)])
def test_skipped_outputs(kernels: str, columns: tuple[int, ...], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D x is added once, by the kernels or behind them, to o; where heads go in lanes, too."""
    q, k, v, do, g, weight = draw()
    D, bounds = torch.randn(4, *columns), {1: [0, 200], 3: [0, 64, 64, 200]}[ranks]
    monkeypatch.setenv("LEETDIST_LANES", "2" if ranks > 1 else "1")

    def call(own: slice, group: Any = None, **more: Any) -> list[Tensor]:
        leaves = [x[:, :, own].detach().requires_grad_() for x in (q, k, v, g)]
        o, _ = run(tuple(leaves), OPTIONS, resolve(group), weight=weight[:, :, own], **more)  # type: ignore[arg-type]
        return [o.detach(), *torch.autograd.grad(o, leaves, do[:, :, own])]

    plain = call(slice(0, TOKENS))
    assert "skipped" not in weighed
    parts = leetdist.virtual_ranks(
        lambda group: call(slice(bounds[group.rank], bounds[group.rank + 1]), group, skip=D), ranks
    )
    found = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
    assert ("skipped" in weighed) == (kernels == "stand-in")
    assert torch.equal(found[0], plain[0] + v * D.view(4, 1, -1))
    if kernels == "stand-in":  # v's own gradient, where D is a number a head
        dv, own = found.pop(3), plain.pop(3)
        assert torch.equal(dv * weight[..., None], own) if columns else torch.equal(dv, own + do * D[:, None, None])
    assert all(torch.equal(x, y) for x, y in zip(found[1:], plain[1:], strict=True))


@pytest.mark.parametrize(
    "case", ["one row", "documents", "ranks", "a number a column", "z", "short", "short, a number a column", "short, z"]
)
def test_gradients_of_x_and_of_what_it_is_multiplied_by(kernels: str, case: str, monkeypatch) -> None:
    """Of Mamba-2's call, whoever makes them: the pass itself, where it can, or one over x behind it."""
    monkeypatch.setenv("LEETDIST_LANES", "2" if case == "ranks" else "1")
    if case.startswith("short"):  # as a GPU's calls go (leetdist.mamba.repeats)
        monkeypatch.setattr(repeats, "_on_gpu", lambda x: True)
    rows = 1 if case == "documents" else 2
    x, dy, z = (torch.randn(rows, TOKENS, 4, 8) for _ in range(3))
    B, C = (torch.randn(rows, TOKENS, 2, 8) for _ in range(2))
    dt, A, D = torch.rand(rows, TOKENS, 4), -torch.rand(4), torch.randn(*((4, 8) if "column" in case else (4,)))
    more = {"cu_seqlens": torch.tensor((0, 20, 100, 130, 200))} if case == "documents" else {}

    def call(own: slice, dtype: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = [y.detach().to(dtype).requires_grad_() for y in (x[:, own], dt[:, own], A, B[:, own], C[:, own], D)]
        gate = z[:, own].to(dtype) if case.endswith("z") else None
        y = leetdist.mamba_chunk_scan_combined(*leaves[:5], D=leaves[5], z=gate, tile=TILE, **more)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[:, own].to(dtype))]

    bounds = [0, 64, 64, 200] if case == "ranks" else [0, 200]
    parts = leetdist.virtual_ranks(
        lambda group: call(slice(bounds[group.rank], bounds[group.rank + 1]), torch.float32, group=group, **more),
        len(bounds) - 1,
    )
    found = [torch.cat(y, 1) if y[0].ndim > 2 else sum(y[1:], y[0]) for y in zip(*parts, strict=True)]
    assert ("late" in weighed) == (kernels == "stand-in")
    assert "written" not in weighed
    weighed.clear()
    with pytest.MonkeyPatch.context() as patch:
        for step, candidates in PYTORCH.items():
            patch.setitem(CANDIDATES, step, candidates)
        forget_kernels()
        wanted, exact = call(slice(None), torch.float32, **more), call(slice(None), torch.float64, **more)
    for name, y, same, right in zip(("y", "dx", "ddt", "dA", "dB", "dC", "dD"), found, wanted, exact, strict=True):
        assert relative_error(y, right) < 2e-6, name
        if name in ("y", "dx", "dB", "dC") and kernels == "PyTorch":
            assert torch.equal(y, same), name


def test_outputs_with_D_can_be_written_over() -> None:
    """As those of other operations: what is learnt is the same."""
    dt, A, D = torch.rand(1, 50, 4), -torch.rand(4), torch.randn(4)
    x, dy, *of_groups = torch.randn(4, 1, 50, 4, 8)
    found = []
    for double in (Tensor.mul, Tensor.mul_):
        leaves = [y.clone().requires_grad_() for y in (x, D)]
        y = leetdist.mamba_chunk_scan_combined(leaves[0], dt, A, *of_groups, D=leaves[1])
        found.append(torch.autograd.grad(double(y, 2.0), leaves, dy))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_explain_names_who_multiplies_and_what_runs_around_it(kernels: str) -> None:
    q, k, v, _, g, _ = draw()
    said = leetdist.explain(q, k, v, g)
    around = said.split("around   ")[1].split("\nnot ")[0]
    within = "v times its weights, D x without z" if kernels == "stand-in" else "v times its weights"
    assert f"{within} by {kernels}" in around
    for step in ("dt, D x and z, gradients of x, dt, A and D, gradient of z by", "convolution, its gradient by"):
        assert step in around
    if kernels == "PyTorch":  # the stand-in has no constant decay
        assert "around" not in leetdist.explain(q, k, v, g[0, :, 0].contiguous())


def test_weights_are_agreed_on() -> None:
    q, k, v, _, g, weight = draw()

    def rank(group: Any) -> None:
        with pytest.raises(ValueError, match="disagree on weighted"):
            run((q, k, v, g), OPTIONS, resolve(group), weight=weight if group.rank else None)

    leetdist.virtual_ranks(rank, 2)


HOPPER = Facts(
    Machine("cuda", (9, 0), "2.13.0", "3.6.0", None, None, (13, 0)), Settings(None, True, False), torch.bfloat16,
    rows=128, columns=64, tile=1024, operator="token_decay",
)  # fmt: skip


@pytest.mark.parametrize(
    ("own", "module", "why"),
    [
        ({"weighs": True, "shares": (8, 8, 1)}, "cuda.weights", None),
        ({"weighs": False, "shares": (8, 8, 1)}, "triton.block", "kernels of the pass that take weights"),
        ({"weighs": True, "shares": (2, 2, 1)}, "triton.block", "multiples of 4 heads that share q and k"),
    ],
)
def test_who_multiplies_v_by_its_weights(own: dict[str, Any], module: str, why: str | None) -> None:
    """The kernels that read it, where they all can."""
    choice = choose(Use("weighted_values"), replace(HOPPER, **own))
    assert choice.implementation.module == module
    assert [str(why) in reason for _, reason in choice.refused] == ([] if why is None else [True])


def test_a_compiled_call_does_not_take_a_plan_with_weights() -> None:
    """Both bring one option more than others do: that values are read, and that there is a weight."""
    x, log_decay = torch.randn(1, 2, 40, 8), -torch.rand(1, 2, 40)

    def weighted(group: Any = None) -> list[bool]:
        more: list[dict[str, Any]] = [{"weighted": True}, {"read_values": True}]
        found = (planning.plan_call(x, x, x, log_decay, transport=resolve(group), **OPTIONS, **one) for one in more)
        return [one.problem.weighted for one in found]

    assert weighted() == [True, False]
    assert leetdist.virtual_ranks(weighted, 1) == [[True, False]]
