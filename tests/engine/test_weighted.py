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
from leetdist.engine import planning
from leetdist.engine.call import run
from leetdist.kernels.common.settings import Settings
from leetdist.kernels.token_decay.pytorch import block
from leetdist.operators.dispatch import Use, choose
from leetdist.operators.facts import Facts, Machine
from leetdist.operators.implementations import CANDIDATES, Implementation
from leetdist.operators.methods import _kernels_for
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


def early_gradients(q, k, v, do, states, log_decay, tiles, *, scale, out, weight):
    options: dict[str, Any] = {"reverse": False, "scale": scale, "state_scale": scale, "out_dtype": q.dtype}
    return block.tile_outputs(do, product("early", v, weight), k, states.mT, log_decay, tiles, out=out, **options), {}


def late_gradients(q, k, v, do, states, ends, log_decay, tiles, kept, *, scale, outs, weight):
    v = product("late", v, weight)
    options: dict[str, Any] = {"reverse": True, "scale": scale, "state_scale": 1.0, "out_dtype": q.dtype}
    dk = block.tile_outputs(v, do, q, ends.mT, log_decay, tiles, out=outs[0], **options)
    dv = block.tile_outputs(k, q, do, ends, log_decay, tiles, out=outs[1], **options)
    grad = block.decay_gradient(q, k, v, do, states, ends, log_decay, tiles, scale=scale)
    return dk, dv, grad if outs[2] is None else outs[2].copy_(grad)


def product(step: str, v: Tensor, weight: Tensor) -> Tensor:
    weighed.append(step)
    return block.weighted_values(v, weight)


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
        for step in (*(function.__name__ for function in steps), "skipped_outputs"):
            monkeypatch.setitem(CANDIDATES, step, (who,))
    _kernels_for.cache_clear()
    planning._plans.clear()
    weighed.clear()
    yield request.param
    _kernels_for.cache_clear()
    planning._plans.clear()


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
        for step in CANDIDATES:
            patch.setitem(CANDIDATES, step, tuple(c for c in CANDIDATES[step] if c.name != "stand-in"))
        for step in ("tile_states", "tile_outputs"):
            patch.setitem(CANDIDATES, step, PYTORCH[step])
        _kernels_for.cache_clear()
        planning._plans.clear()
        q, k, v, do, g, weight = given
        expected = with_gradients([q, k, block.weighted_values(v, weight), do, g])
    for name, x, y in zip(("o", "dq", "dk", "dv", "dg"), found, expected, strict=True):
        assert torch.equal(x, y), name


PYTORCH = {step: CANDIDATES[step] for step in ("tile_states", "tile_outputs")}


def test_forward_alone(kernels: str) -> None:
    q, k, v, _, g, weight = draw()
    o, _ = run((q, k, v, g), OPTIONS, None, weight=weight)
    assert set(weighed) == ({"states", "outputs", "not written"} if kernels == "stand-in" else set())
    assert o.shape == v.shape


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("columns", [(), (8,)])
def test_skipped_outputs(kernels: str, columns: tuple[int, ...], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D x is added once, by the kernels or behind them, to o and to no gradient; where heads go in lanes, too."""
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
    assert all(torch.equal(x, y) for x, y in zip(found[1:], plain[1:], strict=True))


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
