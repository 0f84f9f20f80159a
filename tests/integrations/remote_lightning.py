"""A small model in the form of the releases of Ling-linear and MiniCPM-SALA, whose code transformers does not have.

Every second layer is a lightning layer: fused projections, norms and rotations of q and k, slopes of its own, an
operator of flash-linear-attention's form, a norm, a gate. The cache is their own too. What flash-linear-attention has
kernels for is a loop over tokens here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from leetdist.nn import log_decay


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(B, N, H, D), token by token."""
    decay = g_gamma.expand(q.shape[:3]) if g is None else g
    state = torch.zeros(*q.shape[::2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, None] @ state).squeeze(-2))
    o = torch.stack(out, 1) * (q.shape[3] ** -0.5 if scale is None else scale)
    return o, state if output_final_state else None


fused_recurrent_simple_gla = chunk_simple_gla


class RemoteConfig(PreTrainedConfig):
    model_type = "remote_lightning"

    def __init__(self, style: str = "ling", lightning: bool = False, num_hidden_layers: int = 4, **more: Any) -> None:
        super().__init__(**more)
        self.style, self.hidden_size, self.num_hidden_layers = style, 32, num_hidden_layers
        self.vocab_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim = 61, 4, 2, 8
        others = "linear_attention" if lightning else "full_attention"
        self.layer_types = ["linear_attention", others] * (num_hidden_layers // 2)
        self.use_cache = True


class RemoteCache(DynamicCache):
    """Keys and values of the softmax layers; of the others a state by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, Tensor] = {}


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class LingAttention(nn.Module):
    """As Ling and Ring-linear: operators in a dictionary, which get one decay a token."""

    def __init__(self, config: RemoteConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.heads, self.head_dim = layer_idx, config.num_attention_heads, config.head_dim
        width = self.heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.query_layernorm, self.key_layernorm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.g_norm, self.g_proj = nn.RMSNorm(width), nn.Linear(config.hidden_size, width, bias=False)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)
        slope = log_decay("ling", self.heads, layer_idx, config.num_hidden_layers) / 8
        self.register_buffer("slope", slope, persistent=False)
        self.lightning_attn_ops = {"chunk": chunk_simple_gla, "fused_recurrent": fused_recurrent_simple_gla}

    def operate(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        mode = "fused_recurrent" if q.shape[1] <= 64 else "chunk"
        g = self.slope[None, None, :].expand(*q.shape[:3])
        return self.lightning_attn_ops[mode](q=q, k=k, v=v, g=g, **options)

    def forward(
        self, hidden_states: Tensor, angles: Tensor, past_key_values: Any = None, use_cache: bool = False, **_: Any
    ) -> tuple[Tensor, None]:
        q, k, v = self.query_key_value(hidden_states).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotated(self.query_layernorm(q), angles), rotated(self.key_layernorm(k), angles)
        before = None if past_key_values is None else past_key_values.states.get(self.layer_idx)
        o, state = self.operate(q, k, v, initial_state=before, output_final_state=use_cache)
        if use_cache:
            past_key_values.states[self.layer_idx] = state
        return self.dense(self.g_norm(o.flatten(2)) * torch.sigmoid(self.g_proj(hidden_states))), None


class SalaAttention(LingAttention):
    """As MiniCPM-SALA: operators by their global names, which get one decay a head."""

    def operate(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        operator = fused_recurrent_simple_gla if q.shape[1] == 1 else chunk_simple_gla
        return operator(q, k, v, g_gamma=self.slope, scale=1.0, **options)


def eager_attention_forward(*_: Any, **__: Any) -> Any:
    """What transformers looks for in a model whose attention can be another one."""
    raise NotImplementedError


class SoftmaxAttention(nn.Module):
    is_causal = True

    def __init__(self, config: RemoteConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        angles: Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        size = self.config.head_dim
        q = rotated(self.q_proj(hidden_states).unflatten(-1, (-1, size)), angles).transpose(1, 2)
        k, v = self.kv_proj(hidden_states).unflatten(-1, (2, -1, size)).unbind(2)
        k, v = rotated(k, angles).transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        o, weights = attend(self, q, k, v, attention_mask, scaling=size**-0.5, dropout=0.0, **more)
        return self.o_proj(o.flatten(2)), weights


class RemoteLayer(nn.Module):
    def __init__(self, config: RemoteConfig, layer_idx: int) -> None:
        super().__init__()
        lightning = {"ling": LingAttention, "sala": SalaAttention}[config.style]
        kind = lightning if config.layer_types[layer_idx] == "linear_attention" else SoftmaxAttention
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden_size) for _ in range(2))
        self.attention = kind(config, layer_idx)
        self.up, self.down = nn.Linear(config.hidden_size, 48), nn.Linear(48, config.hidden_size)

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        x = x + self.attention(self.norms[0](x), **more)[0]
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class RemotePreTrained(PreTrainedModel):
    config_class = RemoteConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_attention_backend = True


class RemoteModel(RemotePreTrained):
    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RemoteLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = RemoteCache()
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length(1)
            position_ids = torch.arange(seen, seen + input_ids.shape[1])[None]
        x, size = self.embed_tokens(input_ids), self.config.head_dim
        angles = position_ids[..., None, None] * 10000.0 ** -torch.arange(0, 1, 2 / size)
        for layer in self.layers:
            x = layer(x, angles=angles, past_key_values=past_key_values, use_cache=bool(use_cache), **more)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class RemoteForCausalLM(RemotePreTrained, GenerationMixin):
    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.model = RemoteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, **more)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        given = {name: more[name] for name in ("shift_labels", "num_items_in_batch") if name in more}
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **given)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RemoteCache()


__all__ = ["LingAttention", "RemoteCache", "RemoteConfig", "RemoteForCausalLM", "SalaAttention"]
