"""Models built on the meta device, parallelized there, and filled afterwards: as if they had been built at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from families import tiny as family
from test_transformers import tiny as minimax
from torch import nn

import leetdist

transformers = pytest.importorskip("transformers")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LightningAttention": lambda: leetdist.nn.LightningAttention(32, 2, learnable_decay=True),
    "Retention": lambda: leetdist.nn.Retention(32, 2),
    "SimpleGLA": lambda: leetdist.nn.SimpleGLA(32, 2),
    "Mamba2": lambda: leetdist.nn.Mamba2(32, head_dim=16, state=16),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_our_own(name: str) -> None:
    """Under this suite's NaN in empty memory, a number that nobody sets shows."""
    built = LAYERS[name]()
    with torch.device("meta"):
        empty = LAYERS[name]()
    layer = leetdist.parallelize(nn.Sequential(empty), None)[0].to_empty(device="cpu")
    assert all(x.isnan().all() for x in layer.parameters())
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(1, 100, 32)
    assert bool(layer(x).isfinite().all())
    for key, parameter in layer.named_parameters():  # of the kind that a layer built at once has
        assert parameter.dtype == built.get_parameter(key).dtype
    layer.load_state_dict(built.state_dict())
    assert torch.equal(layer(x), built(x))


BUILD: dict[str, Callable[[], Any]] = {"MiniMax": minimax, **{name: (lambda n=name: family(n)) for name in FAMILIES}}


@pytest.mark.parametrize("name", BUILD)
def test_models_of_transformers(name: str) -> None:
    """Empty, parallelized, filled from a checkpoint; buffers that no checkpoint has are the model's own to make."""
    built = BUILD[name]()
    with torch.device("meta"):
        model = type(built)(built.config).eval()
    model = leetdist.parallelize(model, None).to_empty(device="cpu")
    model.load_state_dict(built.state_dict())
    for key, buffer in built.named_buffers():
        model.get_buffer(key).copy_(buffer)
    ids = torch.arange(1, 61)[None]
    with torch.no_grad():
        expected = leetdist.parallelize(built, None)(ids, use_cache=False).logits
        assert bool(expected.isfinite().all())
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["MiniMax", "Mamba2", "Bamba"])
def test_a_bf16_model_computes_with_the_decays_of_one_process(name: str) -> None:
    """Rounded as they are in the unsharded model or kept in fp32 as there: a shard forgets at the same rate."""
    ids = torch.arange(150)[None] * 7 % 60 + 1
    whole = leetdist.parallelize(BUILD[name]().bfloat16(), None)
    models = [BUILD[name]().bfloat16() for _ in range(2)]
    assert {x.dtype for x in whole.parameters()} == {torch.bfloat16}

    def rank(group: Any) -> torch.Tensor:
        model = leetdist.parallelize(models[group.rank], group)
        with torch.no_grad():
            return leetdist.gather_sequence(model(**leetdist.shard_batch({"input_ids": ids}, group)).logits, 1, group)

    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits.float()
    for out in leetdist.virtual_ranks(rank, 2):
        assert float((out.float() - expected).abs().max() / expected.abs().max()) < 0.03


def test_weights_of_which_zero_3_left_a_part_have_their_shapes() -> None:
    """As `from_pretrained` gives them where TrainingArguments with such a `deepspeed` came first."""
    model: Any = family("Bamba")
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert leetdist.parallelize(model, None) is model
