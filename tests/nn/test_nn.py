"""The modules, the decay ladders, and the small language model."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any, cast

import pytest
import torch

import leetdist
from leetdist.launch.model import Config, LanguageModel
from leetdist.nn import LADDERS, LightningAttention, Retention, log_decay
from leetdist.reference import relative_error

LAYERS = {
    "lightning": lambda **more: LightningAttention(32, 4, decay="fla-lightning", **more),
    "lightning, learnable": lambda **more: LightningAttention(32, 4, learnable_decay=True, **more),
    "retention": lambda **more: Retention(32, 4, **more),
    "retention, no xPos": lambda **more: Retention(32, 4, rotary=False, **more),
}


@pytest.mark.parametrize("name", sorted(LADDERS))
@pytest.mark.parametrize("heads", [1, 2, 6, 8, 20])
def test_ladders_are_decays(name: str, heads: int) -> None:
    for layer in range(3):
        decay = log_decay(name, heads, layer, 3)
        assert decay.shape == (heads,)
        assert decay.dtype == torch.float32
        assert bool((decay <= 0).all())


def test_published_numbers() -> None:
    # ALiBi's paper: 8 heads have 1/2 ... 1/256; other counts take every other slope of the next power of two.
    assert (-log_decay("alibi", 8)).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]
    torch.testing.assert_close(-log_decay("alibi", 12), torch.tensor(twelve))
    # RetNet's paper: 1 - 2^(-5 - i).
    torch.testing.assert_close(log_decay("retnet", 3).exp(), 1 - 2.0 ** torch.tensor([-5, -6, -7]))
    # fla: -(8 / H) (1 - layer / layers) head.
    torch.testing.assert_close(log_decay("fla-lightning", 4, 1, 4), torch.tensor([0, -1.5, -3, -4.5]))
    # Heads that are a power of two: TransNormerLLM's ladder is ALiBi's, times 1 - layer / (layers - 1) + 1e-5.
    torch.testing.assert_close(log_decay("tnl", 8, 1, 3), log_decay("alibi", 8) * (0.5 + 1e-5))
    # Ling's releases count one layer before, mlx-lm too but for the first layer.
    shares = {"tnl": (1, 0.75, 0), "ling": (1.25, 1, 0.25), "ling-mlx": (1, 1, 0.25)}
    for name, expected in shares.items():
        for layer, share in zip((0, 1, 4), expected, strict=True):
            torch.testing.assert_close(log_decay(name, 8, layer, 5), log_decay("alibi", 8) * (share + 1e-5))


def test_minimax_ladder_is_that_of_transformers() -> None:
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = minimax.MiniMaxConfig(
        hidden_size=60, num_attention_heads=6, num_key_value_heads=6, num_hidden_layers=5, block_size=4
    )
    for layer in (1, 3):
        theirs = minimax.MiniMaxLightningAttention(config, layer).get_slope_rate().flatten()
        torch.testing.assert_close(-log_decay("minimax", 6, layer, 5), theirs)


def test_unknown_ladder_and_bad_layers_are_errors() -> None:
    with pytest.raises(ValueError, match="got 'tnn'"):
        log_decay("tnn", 4)
    with pytest.raises(ValueError, match="layer 2 of 2"):
        log_decay("tnl", 4, 2, 2)
    with pytest.raises(ValueError, match="decay must be"):
        LightningAttention(32, 4, decay=torch.ones(4))
    with pytest.raises(ValueError, match="heads must divide the width 32, got 5"):
        Retention(32, 5)
    with pytest.raises(ValueError, match=r"heads must be a whole number, got 4\.0"):
        log_decay("tnl", cast(int, 4.0))


@pytest.mark.parametrize("kind", [LightningAttention, Retention, leetdist.nn.SimpleGLA, leetdist.nn.Mamba2])
def test_a_layers_arguments_are_named(kind: Any) -> None:
    for heads in ("4", 4.0, True):
        with pytest.raises(ValueError, match=f"heads must be a whole number, got {heads!r}"):
            kind(32, heads)
    layer = kind(32, 4, 16) if kind is leetdist.nn.Mamba2 else kind(32, 4)
    with pytest.raises(ValueError, match=r"x must have shape .* got list"):
        layer([1])
    for shape in ((40, 32), (1, 40, 16), (1, 1, 40, 32)):
        with pytest.raises(ValueError, match=rf"x must have shape .* \(B, N, 32\), got {re.escape(str(shape))}"):
            layer(torch.randn(shape))


def test_a_layer_moves_while_its_parameters_are_elsewhere() -> None:
    """As FullyShardedDataParallel's `to` and `float` move what it has wrapped."""
    layer = LightningAttention(32, 4)
    for part in layer.modules():
        part._parameters.clear()
    assert layer.float() is layer


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", [LightningAttention, Retention, leetdist.nn.SimpleGLA])
def test_a_state_comes_back_where_it_is_asked_for(kind: Any, exact: bool) -> None:
    """However many tokens go on from one: a step of decoding returned it unasked."""
    layer, more = kind(32, 4, exact=exact), {}
    with torch.no_grad():
        _, state = layer(torch.randn(2, 20, 32), return_state=True)
        for count in (1, 3):
            if kind is Retention:
                more["position_ids"] = torch.arange(20, 20 + count)[None]
            x = torch.randn(2, count, 32)
            y, after = layer(x, state=state, return_state=True, **more)
            assert torch.equal(layer(x, state=state, **more), y)
            assert after is not None


def test_retention_is_the_papers_equation() -> None:
    """Eqs. 3 to 8 with complex numbers: (QΘ)(KΘ)^* ⊙ D, a group norm over each head, and the swish gate."""
    layer = Retention(24, 3).double()
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    n = torch.arange(30, dtype=torch.float64)
    theta = 10000.0 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    turn = torch.exp(1j * n[:, None] * theta)
    q, k = (
        torch.view_as_complex(proj(x)[0].view(30, 3, 4, 2)) * turn[:, None] for proj in (layer.q_proj, layer.k_proj)
    )
    v = layer.v_proj(x)[0].view(30, 3, 16)
    gamma = 1 - 2.0 ** -torch.arange(5, 8, dtype=torch.float64)
    decay = (gamma[:, None, None] ** (n[:, None] - n).clamp_min(0)).tril()
    scores = torch.einsum("nhd,mhd->hnm", q, k.conj()).real * decay / 8**0.5
    o = torch.einsum("hnm,mhd->nhd", scores, v)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = layer.gate(x)[0]
    expected = layer.out_proj(gate * gate.sigmoid() * o.flatten(1))
    # Angles and decays are fp32.
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_the_whole(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, 40, 32)
    position = torch.arange(40)[None]
    options = [{"position_ids": position[:, i:j]} if name == "retention" else {} for i, j in ((0, 37), (37, 38))]
    whole = layer(x)
    y, state = layer(x[:, :37], return_state=True, **options[0])
    torch.testing.assert_close(y, whole[:, :37])
    y, _ = layer(x[:, 37:38], state=state, return_state=True, **options[1])
    torch.testing.assert_close(y, whole[:, 37:38])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 2e-15)], ids=["float32", "float64"]
)
def test_sharded_layer_equals_whole(name: str, ranks: int, dtype: torch.dtype, bound: float) -> None:
    """Outputs, and the sum over ranks of every parameter's gradient, with checkpointing. (Ranks' sums are added up in
    another order than one device's, so no single number of them is exact.)"""
    layer = LAYERS[name]().to(dtype)
    x, dy = torch.randn(2, 2, 100, 32, dtype=dtype)
    (layer(x) * dy).sum().backward()
    expected = {key: p.grad for key, p in layer.named_parameters()}
    positions = torch.arange(100)[None]

    def rank(group):
        local = LAYERS[name](group=group).to(dtype)
        local.load_state_dict(layer.state_dict())
        x_local, dy_local, position = (leetdist.shard_sequence(y, 1, group) for y in (x, dy, positions))
        options = {"position_ids": position} if name == "retention" else {}
        y = torch.utils.checkpoint.checkpoint(local, x_local, use_reentrant=False, **options)
        (y * dy_local).sum().backward()
        return y.detach(), {key: p.grad for key, p in local.named_parameters()}

    results = leetdist.virtual_ranks(rank, ranks)
    torch.testing.assert_close(torch.cat([y for y, _ in results], 1), layer(x))
    for key, grad in expected.items():
        error = relative_error(sum(grads[key] for _, grads in results), grad)
        assert error <= bound, f"{key}: relative error {error:.1e}"


def test_recomputing_after_a_sequence_parallel_warns() -> None:
    layer, words = LAYERS["lightning"](), ".* recomputed in a backward pass, has no group"

    def recomputed(group, *, inside: bool) -> None:
        x = torch.randn(1, 16, 32, requires_grad=True)
        with leetdist.sequence_parallel(group):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
            if inside:
                y.sum().backward()
        if not inside:
            y.sum().backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", words)
        leetdist.virtual_ranks(partial(recomputed, inside=True), 2)
    with pytest.warns(UserWarning, match=words):
        leetdist.virtual_ranks(partial(recomputed, inside=False), 2)

    def block(x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    def another(x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    def of_no_group(function: Any) -> None:
        y = torch.utils.checkpoint.checkpoint(function, torch.randn(1, 16, 32, requires_grad=True), use_reentrant=False)
        y.sum().backward()

    def both(group):
        of_no_group(another)
        with leetdist.sequence_parallel(group):
            block(torch.randn(1, 16, 32))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", words)
        of_no_group(block)  # whose line has never made a call of a group
        leetdist.virtual_ranks(both, 2)
    with pytest.warns(UserWarning, match=words):
        of_no_group(block)


def test_rotary_without_positions_is_refused_under_a_group() -> None:
    def rank(group):
        Retention(32, 4, group=group)(torch.randn(1, 16, 32))

    def surrounded(group):
        with leetdist.sequence_parallel(group):
            Retention(32, 4)(torch.randn(1, 16, 32))

    for function in (rank, surrounded):
        with pytest.raises(ValueError, match="position_ids must be given"):
            leetdist.virtual_ranks(function, 2)


def test_bf16_leaves_the_decays_alone() -> None:
    layer = LightningAttention(32, 4, layer=3, layers=4)
    before = layer.log_decay(torch.device("cpu")).clone()
    layer.bfloat16()
    assert torch.equal(layer.log_decay(torch.device("cpu")), before)


@pytest.mark.parametrize("decay", ["tnl", "retnet", torch.tensor([-1e-3, -0.1, -2.0, 0.0])])
def test_learnt_decays_in_bf16_are_those_of_fp32(decay) -> None:
    layer = LightningAttention(32, 4, decay=decay, learnable_decay=True)
    before = layer.log_decay(torch.device("cpu")).clone()
    torch.testing.assert_close(before, log_decay(decay, 4) if isinstance(decay, str) else decay, atol=2e-6, rtol=1e-6)
    layer.bfloat16()
    assert torch.equal(layer.log_decay(torch.device("cpu")), before)
    torch.nn.init.normal_(layer.log_slope, std=0.05)  # and what is learnt is rounded by its own size
    bf16 = layer.log_decay(torch.device("cpu"))
    layer.float()
    assert torch.equal(layer.log_decay(torch.device("cpu")), bf16)


def test_learnt_decays_under_fsdp2_in_bf16() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = leetdist.device_mesh(sequence=1, device_type="cpu")
    layer = LightningAttention(32, 4, learnable_decay=True)
    right = layer.log_decay(torch.device("cpu")).detach()
    found = []
    attend = layer.attend
    layer.attend = lambda q, *rest: found.append(layer.log_decay(q.device)) or attend(q, *rest)
    fully_shard(layer, mesh=mesh["sp"], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    layer(torch.randn(1, 20, 32)).sum().backward()
    assert torch.equal(found[0].detach(), right)
    assert layer.log_slope.grad.full_tensor().any()


def test_parameters_of_earlier_checkpoints_are_converted() -> None:
    """They had log_slope, the whole logarithm; whatever carries them may drop what a module says of its version."""
    layer = LightningAttention(32, 4, learnable_decay=True)
    old = dict(layer.state_dict())
    learnt = torch.tensor([-0.3, -0.1, -0.02, -0.007])
    del old["log_slope_change"]
    old["log_slope"] = learnt.neg().log()
    layer.load_state_dict(old)
    torch.testing.assert_close(layer.log_decay(torch.device("cpu")), learnt)
    layer.load_state_dict(dict(layer.state_dict()))
    torch.testing.assert_close(layer.log_decay(torch.device("cpu")), learnt)


@pytest.mark.parametrize("learnable", [False, True])
def test_meta_initialisation(learnable: bool) -> None:
    with torch.device("meta"):
        layer = LightningAttention(32, 4, layer=1, layers=3, learnable_decay=learnable)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        reset = getattr(module, "reset_parameters", None)
        assert reset is not None or not list(module.parameters(recurse=False))
        if reset is not None:
            reset()
    right = LightningAttention(32, 4, layer=1, layers=3, learnable_decay=learnable)
    assert torch.equal(layer.log_decay(torch.device("cpu")), right.log_decay(torch.device("cpu")))


@pytest.mark.parametrize("decay", [[-1, float("nan")], [-1, 0.1], [-1]])
def test_bad_decays_of_a_layer_are_errors(decay) -> None:
    with pytest.raises(ValueError, match="decay must be"):
        LightningAttention(32, 2, decay=torch.tensor(decay))
    with pytest.raises(ValueError, match="decay must be finite to be learnt"):
        LightningAttention(32, 2, decay=torch.tensor([-1, -float("inf")]), learnable_decay=True)


def test_decays_kept_in_inference_mode_are_right_for_training() -> None:
    layer = LightningAttention(32, 4)
    with torch.inference_mode():
        layer(torch.randn(1, 20, 32))
    layer(torch.randn(1, 20, 32)).sum().backward()


@pytest.mark.parametrize("first", [2**20, 10_000_000, 2**27])
def test_late_positions_turn_as_early_ones(first: int) -> None:
    """Retention depends on distances alone."""
    layer, x, positions = Retention(64, 1), torch.randn(1, 100, 64), torch.arange(100)[None]
    near, far = (layer(x, position_ids=positions + start).detach() for start in (0, first))
    assert float((far - near).abs().max() / near.abs().max()) < 2e-6


def test_default_dtype_leaves_angles_alone() -> None:
    layer, x = Retention(64, 1), torch.randn(1, 100, 64)
    expected = layer(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_layer_loads_the_weights_of_minimax() -> None:
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = minimax.MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=3, block_size=8
    )
    theirs = minimax.MiniMaxLightningAttention(config, 1)
    ours = LightningAttention(32, 4, decay="minimax", layer=1, layers=3)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
    x = torch.randn(2, 50, 32)
    torch.testing.assert_close(ours(x), theirs(x, None, None)[0])


def test_language_model_steps_as_it_runs() -> None:
    model = LanguageModel(Config(dim=32, layers=2, heads=2, hidden=64))
    tokens = torch.randint(256, (2, 50))
    logits = model(tokens)
    last, states = model.step(tokens[:, :48])
    torch.testing.assert_close(last, logits[:, 47])
    for t in (48, 49):
        last, states = model.step(tokens[:, t : t + 1], states)
        torch.testing.assert_close(last, logits[:, t])


def test_the_100m_preset_has_100m_parameters() -> None:
    with torch.device("meta"):
        model = LanguageModel(Config.preset("100m"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(100e6, rel=0.01)
