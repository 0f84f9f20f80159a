"""What softmax layers ask of attention by their options: served on shards as in one process, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist

LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("Gemma2", {}, "sliding_attention"),
        ("Mistral", {"sliding_window": 8}, "sliding_window=8"),
        ("MiniMax", {"sliding_window": 8, "num_local_experts": 2}, "sliding_window=8"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary_emb have rope_type 'dynamic'"),
        ("FalconH1", {"rope_parameters": LONGROPE}, "rotary_emb have rope_type 'longrope'"),
        ("Bert", {}, "later tokens"),
        ("Bloom", {}, "BloomModel"),
        ("Roberta", {"is_decoder": True}, "whose positions are not 0"),
        ("Mamba", {}, "MambaMixer"),
        ("RecurrentGemma", {}, "RecurrentGemma"),
    ],
)
def test_what_a_models_attention_asks_for_is_served_or_refused_by_name(name: str, changes: Any, word: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **heads, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=word):
        leetdist.virtual_ranks(lambda group: leetdist.parallelize(model, group), 2)


def test_dropout_of_attention_is_refused_where_it_drops() -> None:
    """Of evaluation it is no option; in training it would drop other weights than one process."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, attention_dropout=0.1)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(64)[None] % 61

    def rank(group: Any) -> None:
        mine, batch = leetdist.parallelize(copy.deepcopy(model), group), leetdist.shard_batch({"input_ids": ids}, group)
        mine(**batch)
        with pytest.raises(ValueError, match=r"dropout=0\.1"):
            mine.train()(**batch)

    leetdist.virtual_ranks(rank, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "Gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1, "final_logit_softcapping": None},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("heads", [4, 1])
def test_soft_caps_and_sinks_are_served(name: str, heads: int) -> None:
    """Logits and gradients, of models that differ without: sinks and caps are in the attention of shards as well."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=heads, layer_types=["full_attention"] * 2, attn_implementation="eager", **OPTIONS[name],
    )  # fmt: skip

    def build(*, without: bool = False) -> Any:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "sinks" in key:
                    p.fill_(-30.0 if without else 2.0)
                elif p.ndim > 1:
                    p.copy_(torch.randn(p.shape) * (4 if "q_proj" in key else 1) * p.shape[-1] ** -0.5)
        if without:
            model.config.attn_logit_softcapping = None
            for layer in model.model.layers:
                layer.self_attn.attn_logit_softcapping = None
        return model.eval()

    ids = torch.arange(96)[None] * 7 % 61
    whole, models = build(), [build(), build()]
    expected = whole(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    other = build(without=True)(ids).logits - expected.logits
    assert float(other.detach().abs().max()) > 0.01

    def rank(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = leetdist.parallelize(models[group.rank], group)
        out = model(**leetdist.shard_batch({"input_ids": ids, "labels": ids}, group))
        (out.loss / 2).backward()
        return leetdist.gather_sequence(out.logits, 1, group).detach(), {k: p.grad for k, p in model.named_parameters()}

    found = leetdist.virtual_ranks(rank, 2)
    torch.testing.assert_close(found[0][0], expected.logits.detach(), atol=1e-4, rtol=1e-4)
    for key, p in whole.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(sum(g[key] for _, g in found), p.grad, atol=1e-5, rtol=1e-3, msg=key)


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Bamba", {"attention_bias": True, "rope_parameters": YARN}),
        ("FalconH1", {"attention_bias": True, "rope_parameters": YARN}),
        ("GraniteMoeHybrid rope", {"attention_bias": True, "rope_parameters": YARN}),
        ("Zamba2", {"rope_parameters": YARN}),
        ("Zamba2", {"use_mem_rope": False}),
    ],
)
def test_options_of_hybrids_softmax_layers_are_served(name: str, changes: Any) -> None:
    pytest.importorskip("transformers")
    from families import relative, tiny

    ids = torch.arange(96)[None] * 7 % 61
    models = [tiny(name, **copy.deepcopy(changes)) for _ in range(3)]  # a configuration changes what it is given
    with torch.no_grad():
        expected = models[2](ids, use_cache=False).logits
        assert relative(tiny(name)(ids, use_cache=False).logits, expected) > 0.01

    def rank(group: Any) -> Tensor:
        model = leetdist.parallelize(models[group.rank], group)
        with torch.no_grad():
            logits = model(**leetdist.shard_batch({"input_ids": ids}, group)).logits
        return leetdist.gather_sequence(logits, 1, group)

    for logits in leetdist.virtual_ranks(rank, 2):
        assert relative(logits, expected) < 1e-5
