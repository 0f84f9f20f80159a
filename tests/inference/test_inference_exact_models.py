"""Models whose layers are exact: a session gives each token the bits of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import leetdist
from leetdist.launch.model import Config, LanguageModel

DIM = 64


class Products(nn.Linear):
    """A product whose rows do not depend on how many there are: always 16 at a time, each in a call of its own."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        blocks = F.pad(rows, (0, 0, 0, -len(rows) % 16)).split(16)
        y = torch.cat([block.clone() @ self.weight.mT for block in blocks])[: len(rows)]
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


def model_of(layer: Callable[..., nn.Module], **options: Any) -> LanguageModel:
    model = LanguageModel(Config(dim=DIM, layers=2, heads=2, hidden=96))
    for number, block in enumerate(model.blocks):
        if not getattr(layer, "by_token", False):
            options.update(layer=number, layers=2)
        block.attention = layer(DIM, heads=2, tile=32, exact=True, **options)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Products
    return model


LAYERS = [
    (leetdist.nn.LightningAttention, {}),
    (leetdist.nn.Retention, {"rotary": False}),
    (leetdist.nn.SimpleGLA, {}),
]
MAMBA2 = leetdist.nn.Mamba2, {"head_dim": 64, "state": 16}


@pytest.mark.parametrize(("layer", "options"), LAYERS)
@torch.no_grad()
def test_a_session_has_the_bits_of_one_forward_pass(layer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = model_of(layer, **options), torch.randint(0, 256, (2, 150))
    whole = model(tokens)
    session = leetdist.Session(model, piece=50)
    assert torch.equal(session.prefill(tokens[:, :70]), whole[:, 69])
    for t in range(70, 90):
        assert torch.equal(session.step(tokens[:, t : t + 1]), whole[:, t])
    leetdist.save_states(tmp_path / "states", session.keep())
    other = leetdist.Session(model)
    other.resume(leetdist.load_states(tmp_path / "states"))
    assert torch.equal(other.prefill(tokens[:, 90:131]), whole[:, 130])
    other.fork(2)
    assert torch.equal(other.step(tokens[:, 131:132].repeat_interleave(2, 0)), whole[:, 131].repeat_interleave(2, 0))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_session_of_mamba2_has_the_bits_of_one_forward_pass(dtype: torch.dtype, device: str) -> None:
    """Convolution, steps, scan, D x, gate and norm of a token, however it comes; on a GPU by a captured graph."""
    layer, options = MAMBA2
    model = model_of(layer, **options).to(device, dtype)
    tokens = torch.randint(0, 256, (2, 150), device=device)
    whole = model(tokens)
    session = leetdist.Session(model, piece=50)
    assert torch.equal(session.prefill(tokens[:, :70]), whole[:, 69])
    for t in range(70, 100):  # through ends of tiles
        assert torch.equal(session.step(tokens[:, t : t + 1]), whole[:, t])
    assert torch.equal(session.prefill(tokens[:, 100:131]), whole[:, 130])
    session.fork(2)
    assert torch.equal(session.step(tokens[:, 131:132].repeat_interleave(2, 0)), whole[:, 131].repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="keep: the states of these layers are several tensors each: save session"):
        session.keep()
    with pytest.raises(ValueError, match="resume: the states of these layers are several tensors each: restore sess"):
        session.resume({})


@pytest.mark.parametrize(("layer", "options"), [(leetdist.nn.LightningAttention, {}), MAMBA2])
@pytest.mark.parametrize("ranks", [1, 3])
@torch.no_grad()
def test_a_shared_prompt_has_the_bits_of_one_forward_pass(layer: Any, options: dict[str, Any], ranks: int) -> None:
    model, tokens = model_of(layer, **options), torch.randint(0, 256, (1, 150))
    whole = model(tokens)

    def on_a_rank(group: Any) -> list[Tensor]:
        session = leetdist.Session(model, group=group, piece=32)
        return [session.prefill(tokens[:, :120]), session.step(tokens[:, 120:121]), session.prefill(tokens[:, 121:])]

    for found in leetdist.virtual_ranks(on_a_rank, ranks):
        for o, at in zip(found, (119, 120, 149), strict=True):
            assert torch.equal(o, whole[:, at])


def decoded(layer: leetdist.nn.Mamba2, x: Tensor, pieces: list[int], calls: list[int]) -> Tensor:
    """A prefill in pieces, and then calls of a few tokens on a pool."""
    state, outputs, parts = None, [], list(x.split([*pieces, *calls], 1))
    for part in parts[: len(pieces)]:
        y, state = layer(part, state=state, return_state=True)
        outputs.append(y)
    pool = leetdist.StatePool(len(x), like=state.ssm, exact=True)
    pool.put(state.ssm)
    state = leetdist.nn.Mamba2State(state.conv, pool)
    for part in parts[len(pieces) :]:
        y, state = layer(part, state=state, return_state=True)
        outputs.append(y)
    return torch.cat(outputs, 1)


def mamba2(dtype: torch.dtype, device: str, **more: Any) -> leetdist.nn.Mamba2:
    options = {"head_dim": 64, "state": 64, "groups": 1, "tile": 128, "exact": True} | more
    layer = leetdist.nn.Mamba2(DIM, **options).to(device, dtype)
    for module in (layer.in_proj, layer.out_proj):
        module.__class__ = Products
    return layer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_mamba2_has_the_bits_of_one_call_on_a_gpu(dtype: torch.dtype) -> None:
    for more in ({}, {"state": 128, "head_dim": 32}, {"groups": 2, "conv": 3}):
        layer, x = mamba2(dtype, "cuda", **more), torch.randn(3, 400, DIM, device="cuda").to(dtype)
        assert torch.equal(decoded(layer, x, [1, 2, 70, 127, 100], [1] * 60 + [8, 5, 2, 8, 8, 1, 8]), layer(x))


@pytest.mark.interpreter
@torch.no_grad()
def test_mamba2_has_the_bits_of_one_call_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    layer, x = mamba2(torch.float32, "cpu", head_dim=32, state=16, tile=32), torch.randn(1, 90, DIM)
    assert torch.equal(decoded(layer, x, [2, 50], [1, 1, 8, 8, 8, 8, 4]), layer(x))


def test_mamba2_learns_with_the_bits_of_its_states() -> None:
    """What is kept has no gradient; what is learnt is as in a layer that is not exact, with its tile."""
    layer, x = mamba2(torch.float32, "cpu", tile=32), torch.randn(2, 100, DIM)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(decoded(layer, x, [3, 40, 37], [1, 8, 1, 8, 2]), y)
    y.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer.exact = False
    layer(x).square().sum().backward()
    assert all(map(torch.equal, gradients, (parameter.grad for parameter in layer.parameters())))


def test_what_an_exact_mamba2_refuses() -> None:
    layer, x = mamba2(torch.float32, "cpu"), torch.randn(1, 20, DIM)
    with pytest.raises(ValueError, match=r"an exact layer's state has no gradient: ask for it, and give one, under"):
        layer(x, return_state=True)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        for name, documents in (
            ("seq_idx", torch.zeros(1, 20, dtype=torch.int32)),
            ("cu_seqlens", torch.tensor([0, 20])),
        ):
            with pytest.raises(
                ValueError, match="seq_idx and cu_seqlens must be None where an exact layer keeps a state"
            ):
                layer(x, state=state, **{name: documents})
        with pytest.raises(
            ValueError, match="state must be a State or an exact StatePool in an exact layer, got Tensor"
        ):
            layer(x, state=leetdist.nn.Mamba2State(state.conv, state.ssm.now), return_state=True)
    with pytest.raises(ValueError, match="tile must be a power of two of at least 16 tokens, or None, got 24"):
        mamba2(torch.float32, "cpu", tile=24)


def test_what_exact_layers_refuse() -> None:
    layer, x = leetdist.nn.LightningAttention(DIM, heads=2, exact=True), torch.randn(1, 20, DIM)
    with pytest.raises(ValueError, match=r"an exact layer's state has no gradient: ask for it, and give one, under"):
        layer(x, return_state=True)
    with torch.no_grad():
        with pytest.raises(ValueError, match="cu_seqlens must be None where an exact layer keeps a state"):
            layer(x, return_state=True, cu_seqlens=torch.tensor([0, 20]))
        with pytest.raises(ValueError, match="state must be a State or an exact StatePool in an exact layer, got Tens"):
            layer(x, state=torch.zeros(1, 2, 32, 32), return_state=True)
    with pytest.raises(ValueError, match="tile must be a power of two of at least 16 tokens, or None, got 24"):
        leetdist.nn.SimpleGLA(DIM, heads=2, tile=24)
    with pytest.raises(ValueError, match="exact must be True or False, got 1"):
        leetdist.nn.Retention(DIM, heads=2, exact=1)
    model = model_of(leetdist.nn.LightningAttention)
    model.blocks[1].attention.tile = 64
    with pytest.raises(ValueError, match="model must have exact layers of one tile, or none"):
        leetdist.Session(model)


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_prompt_that_fails_is_not_taken_in(exact: bool, ranks: int) -> None:
    """Neither the pieces before the one that fails: the same prompt again would follow upon them."""
    model = LanguageModel(Config(vocab=61, dim=DIM, layers=2, heads=2, hidden=96))
    if exact:
        for block in model.blocks:
            block.attention = leetdist.nn.LightningAttention(DIM, 2, exact=True, tile=16)
    first, second = torch.randint(61, (1, 40)), torch.randint(61, (1, 90))

    def rank(group: Any) -> tuple[torch.Tensor, ...]:
        session, told = leetdist.Session(model, group, piece=16), []
        for prompt, piece in ((first, 32), (second, 39 if exact else 32)):
            with pytest.raises(IndexError):  # from a piece on, and so on each rank
                session.prefill(torch.where(torch.arange(90) < piece, second, 61))
            told.append(session.prefill(prompt))
            told.append(session.step(prompt[:, :1]))
        assert session.tokens == 132
        return tuple(told)

    def undisturbed(group: Any) -> tuple[torch.Tensor, ...]:
        session = leetdist.Session(model, group, piece=16)
        calls = (
            (session.prefill, prompt) if n else (session.step, prompt[:, :1])
            for prompt in (first, second)
            for n in (1, 0)
        )
        return tuple(call(tokens) for call, tokens in calls)

    for found, wanted in zip(*(leetdist.virtual_ranks(f, ranks) for f in (rank, undisturbed)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True])
def test_a_step_that_fails_is_not_taken_in(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the blocks before the one that fails, whose states an exact step changes in place; nor at the end of a
    tile."""
    model = LanguageModel(Config(vocab=61, dim=DIM, layers=2, heads=2, hidden=96))
    if exact:
        for block in model.blocks:
            block.attention = leetdist.nn.LightningAttention(DIM, 2, exact=True, tile=16)
    tokens = torch.randint(61, (2, 40))
    session, undisturbed = leetdist.Session(model), leetdist.Session(model)
    assert torch.equal(session.prefill(tokens[:, :10]), undisturbed.prefill(tokens[:, :10]))

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("no memory")

    for place in range(10, 40):
        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[1] if place % 2 else model.norm, "forward", fails)
            with pytest.raises(RuntimeError, match="no memory"):
                session.step(tokens[:, place : place + 1])
        assert session.tokens == place
        ours, theirs = (x.step(tokens[:, place : place + 1]) for x in (session, undisturbed))
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_group_of_one_rank_steps_as_no_group_does() -> None:
    for layer in (leetdist.nn.SimpleGLA(DIM, heads=2), leetdist.nn.LightningAttention(DIM, heads=2)):
        x = torch.randn(1, 30, DIM)
        _, state = layer(x[:, :29], return_state=True)
        expected = layer(x[:, 29:], state=state, return_state=True)

        def on_a_rank(group: Any) -> Any:
            layer.group = group  # noqa: B023
            return layer(x[:, 29:], state=state, return_state=True)  # noqa: B023

        (found,) = leetdist.virtual_ranks(on_a_rank, 1)
        layer.group = None
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
