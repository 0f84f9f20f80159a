"""A view means its values, in every argument; and values are those that a tensor has now."""

from __future__ import annotations

from typing import Any

import any_calls
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import leetdist
from leetdist.engine import values
from leetdist.engine.checks import ONE_DEVICE
from leetdist.kernels.runtime.memo import Memo


@pytest.mark.parametrize("seed", range(60))
def test_any_call_in_any_form(seed: int) -> None:
    """`any_calls.py` makes as many as one likes."""
    assert not any_calls.faults(seed, sharded=seed % 5 != 0)


def arguments(heads: int = 4, tokens: int = 45) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "q": normal(1, heads, tokens, 16),
        "k": normal(1, heads // 2, tokens, 16), "v": normal(1, heads // 2, tokens, 24),
        "log_decay": -normal(heads).abs(), "initial_state": normal(1, heads, 16, 24),
        "do": normal(1, heads, tokens, 24), "dstate": normal(1, heads, 16, 24),
    }  # fmt: skip


def call(given: dict[str, Tensor], method: str = "block") -> list[Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items() if not name.startswith("d")}
    # The forms that were given, of leaves: each view's own gradient is what comes back.
    views = {name: given[name].detach().requires_grad_() for name in leaves}
    q, k, v, *_ = views.values()
    o, state = leetdist.linear_attention(
        q, k, v, views["log_decay"], scale=0.3, initial_state=views["initial_state"], return_state=True, tile=16,
        method=method,
    )  # fmt: skip
    grads = torch.autograd.grad([o, state], list(views.values()), [given["do"], given["dstate"]])
    return [o.detach(), state.detach(), *grads]


def assert_forms_mean_their_values(name: str, method: str, given: dict[str, Tensor]) -> None:
    expected = call(given, method)
    for form, x in any_calls.forms(given[name]):
        for ours, plain in zip(call(given | {name: x}, method), expected, strict=True):
            if method in ONE_DEVICE and name == "do":  # the backward is PyTorch's own, whose products ask for layouts
                torch.testing.assert_close(ours, plain)
            else:
                assert torch.equal(ours, plain), f"{name}, {form}"


@pytest.mark.parametrize("method", ["block", "lightning", "fleet", "causal_dot_product", "vanilla", "recursion"])
@pytest.mark.parametrize("name", arguments())
def test_forms(name: str, method: str) -> None:
    assert_forms_mean_their_values(name, method, arguments())


@pytest.mark.interpreter
def test_forms_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of Triton read log_decay and states as contiguous, and q, k, v as contiguous in the last dimension.
    Interpreted, a call takes a second: in each, all arguments have forms, which in the end are all forms of each."""
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    given = arguments(heads=2, tokens=20)  # two heads of one, and two tiles
    forms = {name: list(any_calls.forms(x)) for name, x in given.items()}
    expected = call(given)
    for turn in range(max(map(len, forms.values()))):
        chosen = {name: of[(turn + place) % len(of)] for place, (name, of) in enumerate(forms.items())}
        for ours, plain in zip(call({name: x for name, (_, x) in chosen.items()}), expected, strict=True):
            assert torch.equal(ours, plain), {name: form for name, (form, _) in chosen.items()}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("by_token", [False, True], ids=["a decay a head", "a decay a token"])
def test_results_can_be_written_over(backend: str, by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors with tokens first, kernels write outputs through a view; what callers get is none."""
    monkeypatch.setenv("LEETDIST_BACKEND", backend)
    given = arguments(heads=2, tokens=20)
    decay = given["log_decay"][:, None].expand(1, 2, 20) if by_token else given["log_decay"]
    leaves = [given[name].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for name in "qkv"]
    found = []
    for double in (Tensor.mul, Tensor.mul_):
        o, state = leetdist.linear_attention(*leaves, decay, return_state=True, tile=16)
        grads = torch.autograd.grad([double(o, 2.0), double(state, 3.0)], leaves, [given["do"], given["dstate"]])
        factor = torch.tensor(2.0, requires_grad=True)
        with torch.no_grad():
            results = leetdist.linear_attention(*leaves, decay, return_state=True, tile=16)
        found.append([*grads, *[torch.autograd.grad(double(x, factor).sum(), factor)[0] for x in results]])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", arguments())
def test_forms_on_a_gpu(name: str) -> None:
    given = {n: x.cuda() for n, x in arguments().items()}
    expected = call(given)
    for form, x in any_calls.forms(given[name]):
        assert all(torch.equal(a, b) for a, b in zip(call(given | {name: x}), expected, strict=True)), form


@pytest.mark.parametrize("form", ["column", "every second", "expanded", "fp64"])
def test_a_log_decay_that_is_a_view(form: str) -> None:
    table = -torch.rand(4, 3)
    log_decay = {
        "column": table[:, 0], "every second": table.flatten()[:8:2], "expanded": table[0, :1].expand(4),
        "fp64": table[:, 1].double(),
    }[form]  # fmt: skip
    given = arguments()
    ours, plain = (call(given | {"log_decay": x}) for x in (log_decay, log_decay.float().contiguous()))
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(ours, plain, strict=True))


class Marked(Tensor):
    """A subclass that only has a name of its own."""


def test_a_subclass_means_its_values() -> None:
    given = arguments()
    marked = {name: x.as_subclass(Marked) for name, x in given.items()}
    assert all(torch.equal(a, b) for a, b in zip(call(marked), call(given), strict=True))


def sharded(log_decay: Tensor, given: dict[str, Tensor]) -> Tensor:
    def rank(group: Any) -> Tensor:
        q, k, v = (leetdist.shard_sequence(given[name], 2, group, tile=16) for name in "qkv")
        with torch.no_grad():
            return leetdist.linear_attention(q, k, v, log_decay, tile=16, group=group)

    return torch.cat(leetdist.virtual_ranks(rank, 3), 2)


@pytest.mark.parametrize("way", ["data", "numpy", "set_", "storage"])
def test_decays_that_changed_unseen(way: str) -> None:
    """No version tells of it, and a head that forgot at once now remembers."""
    given, slow = arguments(), torch.tensor([-0.01, -0.1, -1.0, 0.0])
    array = np.array([-200.0, -0.1, -200.0, -0.1], dtype=np.float32)
    log_decay = torch.from_numpy(array)
    if way == "data":
        log_decay = nn.Parameter(log_decay.clone())
    assert torch.equal(sharded(log_decay, given), sharded(log_decay.detach().clone(), given))
    if way == "data":
        log_decay.data.copy_(slow)
    elif way == "numpy":
        array[:] = slow.numpy()
    elif way == "set_":
        log_decay.set_(slow)
    else:
        log_decay.untyped_storage().copy_(slow.untyped_storage())
    q, k, v = (given[name] for name in "qkv")
    expected = leetdist.linear_attention(q, k, v, slow, tile=16)
    assert torch.equal(sharded(log_decay, given), expected)
    assert torch.equal(leetdist.linear_attention(q, k, v, log_decay, tile=16), expected)
    with torch.no_grad():
        log_decay.data[2] = 0.5
    with pytest.raises(ValueError, match=r"got 0\.5 for head 2"):
        leetdist.linear_attention(q, k, v, log_decay, tile=16)


@pytest.mark.parametrize(
    ("values", "highest"),
    [([-0.01, -5.0], None), ([-4.0, -5.0], (-104.5 / 32,) * 2), ([-0.01, -200.0], (0.0, -104.5))],
)
def test_decays_that_a_plan_relies_on(values: list[float], highest: tuple[float, ...] | None) -> None:
    """Those of a lane that forgets, and of mute heads; where there are none, nothing has to be compared on a GPU."""

    def rank(group: Any) -> tuple[float, ...] | None:
        x = leetdist.shard_sequence(torch.randn(1, 2, 128, 16), 2, group, tile=32)
        leetdist.linear_attention(x, x, x, torch.tensor(values), group=group, tile=32)
        ((_, plan),) = group.plans.values()
        found: tuple[float, ...] | None = plan.highest
        return found

    assert leetdist.virtual_ranks(rank, 2) == [highest] * 2


def test_boundaries_that_changed_unseen() -> None:
    given, bounds = arguments(), np.array([0, 20, 45], dtype=np.int32)
    cu_seqlens = torch.from_numpy(bounds)
    q, k, v = (given[name] for name in "qkv")
    leetdist.linear_attention(q, k, v, cu_seqlens=cu_seqlens)
    bounds[1] = 7
    expected = leetdist.linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 7, 45]))
    assert torch.equal(leetdist.linear_attention(q, k, v, cu_seqlens=cu_seqlens), expected)
    bounds[1] = 46
    with pytest.raises(ValueError, match="not decrease"):
        leetdist.linear_attention(q, k, v, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("is_need_exp", [True, False])
def test_a_gamma_that_changed_unseen(is_need_exp: bool) -> None:
    given, array = arguments(), np.full(4, 0.25, dtype=np.float32)
    gamma = torch.from_numpy(array)
    q, v = given["q"], given["do"]
    k = given["k"].repeat_interleave(2, 1)
    leetdist.causal_linear_decoder(q, k, v, True, gamma, is_need_exp)
    array[:] = 0.75
    ours = leetdist.causal_linear_decoder(q, k, v, True, gamma, is_need_exp)
    assert torch.equal(ours, leetdist.causal_linear_decoder(q, k, v, True, torch.full((4,), 0.75), is_need_exp))
    array[1] = -1.0
    with pytest.raises(ValueError, match="gamma must be"):
        leetdist.causal_linear_decoder(q, k, v, True, gamma, is_need_exp)


@pytest.mark.gpu
def test_what_changed_unseen_on_a_gpu_gives_nan() -> None:
    """Reading it would stop the stream; nothing is computed from what was read before."""
    given = {name: x.cuda() for name, x in arguments().items()}
    log_decay = torch.tensor([-200.0, -0.1, -200.0, -0.1], device="cuda")
    sharded(log_decay, given)
    log_decay.data.copy_(torch.tensor([-200.0, -0.2, -0.1, -0.1]))
    o = sharded(log_decay, given)
    q, k, v = (given[name] for name in "qkv")
    expected = leetdist.linear_attention(q, k, v, log_decay.clone(), tile=16)
    assert torch.equal(o[:, [0, 1, 3]], expected[:, [0, 1, 3]])
    assert o[:, 2].isnan().all()
    cu_seqlens = torch.tensor([0, 20, 45], device="cuda")
    leetdist.linear_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens)
    cu_seqlens.data[1] = 7
    assert leetdist.linear_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens).isnan().all()


def test_a_graph_copies_no_limits_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a capture they are filled in, and not kept: before the graph is launched they have no values."""
    given = (-3.0, -3.0, 0.0, -1.0, -1.0), torch.float64, torch.device("cpu")
    monkeypatch.setattr(values, "_limits", Memo(8))
    monkeypatch.setattr(values, "_capturing", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", None)
        captured = values._on_device(*given)
        assert not values._limits
    monkeypatch.setattr(values, "_capturing", lambda: False)
    assert torch.equal(captured, values._on_device(*given))
    monkeypatch.setattr(values, "_capturing", lambda: True)
    assert values._on_device(*given) is values._on_device(*given)  # known from outside


@pytest.mark.parametrize("layer", [leetdist.nn.LightningAttention, leetdist.nn.Retention])
def test_defaults_change_nothing_in_a_layer(layer: Any) -> None:
    module, x = layer(32, 2), torch.randn(1, 20, 32)
    expected = module(x)
    with any_calls.default_dtype(torch.bfloat16), torch.device("meta"):
        assert torch.equal(module(x), expected)


def test_decays_of_other_libraries_shape() -> None:
    """(H, 1, 1) means (H,), unless it is a decay a token of one token of a batch of H."""
    q, k, v = (torch.randn(2, 3, 20, 16) for _ in range(3))
    state, decay = torch.randn(2, 3, 16, 16), torch.tensor([-0.1, -0.5, 0.0])
    column = decay[:, None, None].requires_grad_()
    o = leetdist.linear_attention(q, k, v, column)
    assert torch.equal(o, leetdist.linear_attention(q, k, v, decay))
    o.sum().backward()
    assert column.grad.shape == (3, 1, 1)
    one = [x[:, :, :1] for x in (q, k, v)]
    for mine, theirs in zip(
        leetdist.linear_attention_step(*one, state, column.detach()),
        leetdist.linear_attention_step(*one, state, decay),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    pools = state.clone(), state.clone()
    steps = [leetdist.linear_attention_steps(q, k, v, pools[i], g) for i, g in enumerate((column.detach(), decay))]
    assert torch.equal(*steps)
    assert torch.equal(*pools)
    one, start = [x[:1, :1, :1].expand(3, 1, 1, 16) for x in (q, k, v)], state[:1, :1].expand(3, 1, 16, 16)
    by_token = leetdist.linear_attention_step(*one, start, column.detach())[1]
    for row in range(3):
        expected = leetdist.linear_attention_step(*(x[:1] for x in one), start[:1], decay[row : row + 1])[1]
        assert torch.equal(by_token[row : row + 1], expected)
    with pytest.raises(ValueError, match="log_decay must have shape"):
        leetdist.linear_attention(q, k, v, decay[:2, None, None])
