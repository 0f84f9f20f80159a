"""The recipe of docs/extending.md, a layer of one's own and a handler that gives it its group, generates on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leetdist
from helpers import run_ranks, values
from leetdist.integrations.registry import register

transformers = pytest.importorskip("transformers")

PROMPTS = (150, 2)  # one that ranks could share, and one of too few tokens


class Mixer(nn.Module):
    """Written as for one device: it keeps its state in whatever cache it is handed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.group: Any = None
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.decay = leetdist.nn.log_decay("retnet", heads)

    def forward(self, hidden_states: Tensor, cache: Any = None, past_key_values: Any = None, **_: Any) -> Any:
        cache = past_key_values if cache is None else cache
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(hidden_states).chunk(3, -1))
        o, state = leetdist.linear_attention(
            q, k, v, self.decay, initial_state=getattr(cache, "mixed", None), return_state=True, group=self.group
        )
        if cache is not None:
            cache.mixed = state
        return self.out(o.transpose(1, 2).flatten(2)), None


@register(Mixer)
def _(layer: Mixer, group: Any) -> None:
    layer.group = group


def tiny(name: str) -> Any:
    """A model of transformers, its first attention replaced by the layer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.model.layers[0].self_attn = Mixer(32, 2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)  # or a lost state hardly shows
    return model


def generated(model: Any) -> list[Tensor]:
    ids = torch.randint(61, (2, max(PROMPTS)), generator=torch.Generator().manual_seed(1))
    return [model.generate(ids[:, :tokens], max_new_tokens=6, do_sample=False) for tokens in PROMPTS]


def everything(rank: int, ranks: int, expected: dict[str, list[Tensor]]) -> None:
    torch.set_num_threads(1)
    mesh = leetdist.device_mesh(sequence=ranks)
    for name, tokens in expected.items():
        model = leetdist.parallelize(tiny(name), mesh)
        assert all(map(torch.equal, generated(model), tokens)), name
        ids = torch.arange(150)[None] % 61
        model(**leetdist.shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss.backward()  # shards, as before
        assert all(map(torch.equal, generated(model), tokens)), name
        with pytest.raises(ValueError, match=r"generate\(use_cache=False\)"):
            model.generate(ids, max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("ranks", [2, 3])
def test_layers_of_ones_own_generate_on_ranks(ranks: int) -> None:
    expected = {name: generated(tiny(name)) for name in ("Llama", "MiniMax")}
    values(run_ranks(everything, ranks, ranks, expected, frameworks=True, timeout_s=60))
