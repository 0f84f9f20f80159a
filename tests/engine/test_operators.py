"""An operator of one file has from the engine what the constant decay has: autograd, ranks, documents, equal bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from channel_gate import ChannelGate, recurrence

import leetdist
from leetdist.engine.call import apply_operator
from leetdist.operators.base import Matrix, Scalar, TileOperator
from leetdist.operators.registry import operator_named, register
from leetdist.reference import relative_error

register("channel_gate", ChannelGate)


class TiledDecay(TileOperator):
    """The constant decay once more, from functions of one tile: an input a head, and no kernel."""

    heads = ("log_decay",)
    transition = Scalar()

    def summary(self, q: Any, k: Any, v: Any, log_decay: Any) -> Any:
        left = torch.arange(k.shape[2] - 1, -1, -1, dtype=k.dtype)
        keep = torch.exp(log_decay * k.shape[2])[None]
        return keep, (k * torch.exp(log_decay[:, None] * left)[..., None]).mT @ v

    def tile_outputs(self, state: Any, q: Any, k: Any, v: Any, log_decay: Any) -> Any:
        t = torch.arange(q.shape[2], dtype=q.dtype)
        power = torch.exp(log_decay[:, None, None] * (t[:, None] - t).clamp_min(0))
        seen = torch.where(t[:, None] >= t, power, 0)
        return ((q @ k.mT) * seen) @ v + torch.exp(log_decay[:, None] * (t + 1))[..., None] * (q @ state)


register("tiled_decay", TiledDecay)


class GatedDelta(TileOperator):
    """`S_t = a_t (1 - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`, a_t = exp(g_t): a transition that is no number, and
    whose transpose is another. (Gated DeltaNet, arXiv 2412.06464.)"""

    tokens = ("q", "k", "v", "g", "b")
    transition = Matrix()

    def walk(self, state: Any, q: Any, k: Any, v: Any, g: Any, b: Any) -> Any:
        for t in range(q.shape[2]):
            state = torch.exp(g[:, :, t])[..., None, None] * state
            row = k[:, :, t, None]
            state = state + (b[:, :, t, None, None] * row).mT * (v[:, :, t, None] - row @ state)
            yield state

    def summary(self, **x: Any) -> Any:
        dk, dv = x["k"].shape[3], x["v"].shape[3]
        one = torch.eye(dk, dtype=x["k"].dtype).expand(*x["k"].shape[:2], dk, dk)
        wide = {**x, "v": torch.nn.functional.pad(x["v"], (0, dk))}  # what is added, and beside it what becomes of 1
        *_, end = self.walk(torch.cat((one.new_zeros(*one.shape[:3], dv), one), 3), **wide)
        return end[..., dv:], end[..., :dv]

    def tile_outputs(self, state: Any, **x: Any) -> Any:
        return torch.cat([x["q"][:, :, t, None] @ after for t, after in enumerate(self.walk(state, **x))], 2)


register("gated_delta", GatedDelta)


def inputs_of(batch: int, heads: int, tokens: int, documents: int | None = None) -> dict[str, torch.Tensor]:
    rows = batch if documents is None else documents
    return {
        "q": torch.randn(batch, heads, tokens, 8),
        "k": torch.nn.functional.normalize(torch.randn(batch, heads, tokens, 8), dim=-1),
        "v": torch.randn(batch, heads, tokens, 12),
        "g": -torch.rand(batch, heads, tokens, 8),
        "initial_state": torch.randn(rows, heads, 8, 12),
        "do": torch.randn(batch, heads, tokens, 12),
        "dstate": torch.randn(rows, heads, 8, 12),
    }


def compute(x: dict[str, torch.Tensor], lengths: tuple[int, ...], group: Any = None, **options: Any) -> dict[str, Any]:
    """Outputs and gradients of a rank's shard, by name."""
    rank = 0 if group is None else group.rank
    begin = sum(lengths[:rank])
    local = {name: x[name][:, :, begin : begin + lengths[rank]].clone().requires_grad_() for name in "qkvg"}
    if rank == 0:
        local["initial_state"] = x["initial_state"].clone().requires_grad_()
    q, k, v = (local[name] for name in "qkv")
    o, state = apply_operator(
        "channel_gate", q, k, v, {"g": local["g"]},
        initial_state=local.get("initial_state"), return_state=True, group=group, tile=16, **options,
    )  # fmt: skip
    share = x["dstate"] if rank == 0 else torch.zeros_like(x["dstate"])
    torch.autograd.backward([o, state], [x["do"][:, :, begin : begin + lengths[rank]], share])
    return {"o": o.detach(), "state": state.detach()} | {f"d{name}": leaf.grad for name, leaf in local.items()}


def test_matches_the_recurrence() -> None:
    x = inputs_of(2, 3, 75)
    ours = compute(x, (75,))
    leaves = {name: x[name].double().requires_grad_() for name in ("q", "k", "v", "g", "initial_state")}
    o, state = recurrence(*leaves.values())
    torch.autograd.backward([o, state], [x["do"].double(), x["dstate"].double()])
    exact = {"o": o, "state": state} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    for name, value in ours.items():
        assert relative_error(value, exact[name]) < 1e-6, name


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("documents", [None, (0, 40, 40, 61, 75)], ids=["one sequence", "documents"])
def test_bits_on_ranks(ranks: int, documents: tuple[int, ...] | None) -> None:
    x = inputs_of(2 if documents is None else 1, 3, 75, None if documents is None else len(documents) - 1)
    options = {} if documents is None else {"cu_seqlens": torch.tensor(documents)}
    cuts = [0, *(min(75, 16 * (rank * 5 // ranks)) for rank in range(1, ranks)), 75]
    lengths = tuple(end - begin for begin, end in itertools.pairwise(cuts))
    single = compute(x, (75,), **options)
    results = leetdist.virtual_ranks(lambda group: compute(x, lengths, group, **options), ranks)
    for name, whole in single.items():
        if name in ("state", "dinitial_state"):
            parts = [result[name] for result in results if name in result]
            assert all(torch.equal(part, whole) for part in parts), name
        else:
            assert torch.equal(torch.cat([result[name] for result in results], 2), whole), name


def test_bits_in_a_larger_batch_and_packed() -> None:
    x = inputs_of(2, 2, 50)
    both = compute(x, (50,))
    one = compute({name: value[1:] for name, value in x.items()}, (50,))
    assert all(torch.equal(both[name][1:], one[name]) for name in one)
    packed = {name: torch.cat(value.split(1), 2) if name in (*"qkvg", "do") else value for name, value in x.items()}
    together = compute(packed, (100,), cu_seqlens=torch.tensor([0, 50, 100]))
    for name, value in both.items():
        alone = torch.cat(value.split(1), 2) if name in ("o", "dq", "dk", "dv", "dg") else value
        assert torch.equal(together[name], alone), name


def test_an_input_a_head_and_shared_heads() -> None:
    """The same numbers as the constant decay's own kernels, gradients and grouped heads included, on ranks too."""
    q, k, v = torch.randn(2, 4, 90, 8), torch.randn(2, 2, 90, 8), torch.randn(2, 2, 90, 8)
    log_decay = torch.tensor([-0.01, -0.3, -2.0, 0.0])

    def gradients(operator: str, group: Any = None) -> list[torch.Tensor]:
        leaves = [leetdist.shard_sequence(y, 2, group, tile=16).clone().requires_grad_() for y in (q, k, v)]
        decay = log_decay.clone().requires_grad_()
        o = apply_operator(operator, *leaves, {"log_decay": decay}, group=group, tile=16, scale=0.5)
        o.square().sum().backward()
        return [o.detach(), *(leaf.grad for leaf in leaves), decay.grad]

    ours, kernels = gradients("tiled_decay"), gradients("constant_decay")
    for mine, theirs in zip(ours, kernels, strict=True):
        assert relative_error(mine, theirs) < 2e-6
    ranks = leetdist.virtual_ranks(lambda group: gradients("tiled_decay", group), 3)
    for place, whole in enumerate(ours[:-1]):
        assert torch.equal(torch.cat([results[place] for results in ranks], 2), whole)
    assert torch.equal(sum(results[-1] for results in ranks), ours[-1])


def test_a_transition_that_is_a_matrix() -> None:
    """Against the recurrence in fp64, and the same bits on ranks; gradients too, for which it is transposed."""
    x = inputs_of(1, 2, 60)
    gates = {"g": -torch.rand(1, 2, 60), "b": torch.rand(1, 2, 60)}

    def gradients(group: Any = None) -> list[torch.Tensor]:
        parts = [*(x[name] for name in "qkv"), *gates.values()]
        leaves = [leetdist.shard_sequence(y, 2, group, tile=16).clone().requires_grad_() for y in parts]
        o = apply_operator("gated_delta", *leaves[:3], dict(zip(gates, leaves[3:], strict=True)), group=group, tile=16)
        o.backward(leetdist.shard_sequence(x["do"], 2, group, tile=16))
        return [o.detach(), *(leaf.grad for leaf in leaves)]

    ours = gradients()
    leaves = [y.double().requires_grad_() for y in (*(x[name] for name in "qkv"), *gates.values())]
    named = dict(zip("qkvgb", leaves, strict=True))
    states = GatedDelta.walk(None, torch.zeros(1, 2, 8, 12, dtype=torch.float64), **named)  # type: ignore[arg-type]
    o = torch.cat([leaves[0][:, :, t, None] @ state for t, state in enumerate(states)], 2)
    o.backward(x["do"].double())
    for mine, exact in zip(ours, [o, *(leaf.grad for leaf in leaves)], strict=True):
        assert relative_error(mine, exact) < 2e-6
    for ranks in (2, 3, 5):
        shards = leetdist.virtual_ranks(gradients, ranks)
        for place, whole in enumerate(ours):
            assert torch.equal(torch.cat([shard[place] for shard in shards], 2), whole)


def test_a_broken_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above can fail: a rank that folds its own tiles first, and then takes over what arrives by their
    product, gives other bits."""
    x = inputs_of(1, 1, 75)
    x["g"] *= 0.01
    single, fold = compute(x, (75,)), ChannelGate.fold

    def own_tiles_first(self: Any, keep: Any, states: Any, initial: Any, tiles: Any, **options: Any) -> Any:
        if initial is None or options["reverse"]:
            return fold(self, keep, states, initial, tiles, **options)
        end = fold(self, keep, states, None, tiles, **options)
        product = torch.ones_like(initial)
        for tile in range(tiles.count):
            states[:, :, tile] += product * initial
            product = keep[:, :, tile, :, None] * product
        return end + product * initial

    monkeypatch.setattr(ChannelGate, "fold", own_tiles_first)
    results = leetdist.virtual_ranks(lambda group: compute(x, (32, 43), group), 2)
    o = torch.cat([result["o"] for result in results], 2)
    torch.testing.assert_close(o, single["o"])
    assert not torch.equal(o, single["o"])


def test_bad_gates() -> None:
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    with pytest.raises(ValueError, match="operator must be one of constant_decay"):
        apply_operator("delta", q, k, v, {})
    with pytest.raises(ValueError, match="gates of operator 'channel_gate' must be g, got h"):
        apply_operator("channel_gate", q, k, v, {"h": q})
    with pytest.raises(ValueError, match=r"g must have shape \(B, heads, N, ...\) = \(1, a divisor of 2, 20, ...\)"):
        apply_operator("channel_gate", q, k, v, {"g": q[:, :, :10]})
    with pytest.raises(ValueError, match="log_decay must have shape"):
        apply_operator("tiled_decay", q, k, v, {"log_decay": torch.zeros(3)})
    by_token = -torch.rand(1, 2, 20)
    assert torch.equal(
        apply_operator("token_decay", q, k, v, {"log_decay": by_token}), leetdist.linear_attention(q, k, v, by_token)
    )
    with pytest.raises(ValueError, match=r"must have shape \(H,\) for operator 'constant_decay', got \(1, 2, 20\)"):
        apply_operator("constant_decay", q, k, v, {"log_decay": by_token})
    with pytest.raises(ValueError, match=r"must have shape \(B, H, N\) for operator 'token_decay', got \(2,\)"):
        apply_operator("token_decay", q, k, v, {"log_decay": torch.zeros(2)})
    with pytest.raises(ValueError, match="registered already"):
        register("channel_gate", TiledDecay)
    assert operator_named("channel_gate") is ChannelGate
