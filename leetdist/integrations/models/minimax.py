"""MiniMax's lightning layers through `leetdist.linear_attention`.

Another model with a constant decay needs a file like this one: a subclass of its layer, whose forward calls
`linear_attention` with `group=self.group`, and a handler that gives a layer that class and that group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from leetdist.api import linear_attention, linear_attention_step
from leetdist.integrations.minimax_cache import LightningCache
from leetdist.integrations.registry import register

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

# What a decoder layer hands to every layer, and what means nothing to this one: positions, masks that
# `attention_mask` says already, and what the model does with its outputs.
_MEANINGLESS = {
    "position_ids", "cache_position", "use_cache", "kept", "output_hidden_states", "output_router_logits",
    "return_dict", "logits_to_keep", "num_items_in_batch", "shift_labels", "max_length_q", "max_length_k",
}  # fmt: skip


class LightningAttention(MiniMaxLightningAttention):
    """MiniMax's layer with the same weights and the same result, through leetdist's operator."""

    group: Group | None

    def log_decay(self, device: torch.device) -> Tensor:
        """(H,) fp32: the slopes anew, because the model's buffers take the model's dtype."""
        if torch.compiler.is_compiling() and device not in self.decays:  # a graph keeps nothing outside of itself
            return -self.get_slope_rate().float().flatten().to(device)
        if device not in self.decays:
            with torch.inference_mode(False), torch.device("cpu"):  # kept for training, and for models built on meta
                # Without its `device`, which transformers before 5.23 does not have.
                self.decays[device] = -self.get_slope_rate().float().flatten().to(device)
        return self.decays[device]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As theirs. transformers calls the cache `past_key_values` before 5.24, and `cache` since then."""
        unknown = [name for name, value in kwargs.items() if value is not None and name not in _MEANINGLESS]
        if unknown:
            raise ValueError(f"MiniMax's lightning layer knows no {', '.join(sorted(unknown))} under leetdist")
        cache = past_key_values if cache is None else cache
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        rows, tokens = qkv.shape[:2]
        qkv = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
        if cu_seqlens is not None:  # all rows as one, whose documents are told by offsets
            qkv = qkv.flatten(0, 1)[None]
        q, k, v = qkv.transpose(1, 2).chunk(3, -1)
        o, state = self._attend(q, k, v, cache, cu_seqlens)
        o = o.transpose(1, 2).reshape(rows, tokens, -1)
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o)), state

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        decay = self.log_decay(q.device)
        if cache is None:
            return linear_attention(q, k, v, decay, cu_seqlens=cu_seqlens, group=self.group), None
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: a cache holds one document a row, and packed documents are several")
        state = cache.get_linear_cache(self.layer_idx)
        if isinstance(cache, LightningCache) and self.group is None:  # it keeps the state itself
            return cache.attend(self.layer_idx, q, k, v, decay), cache.get_linear_cache(self.layer_idx)
        if isinstance(state, Tensor) and q.shape[2] == 1 and self.group is None:
            o, state = linear_attention_step(q, k, v, state, decay)
        else:
            state = state if isinstance(state, Tensor) else None
            o, state = linear_attention(q, k, v, decay, initial_state=state, return_state=True, group=self.group)
        cache.set_linear_cache(self.layer_idx, state)
        return o, state


@register(MiniMaxLightningAttention)
def _lightning(layer: Any, group: Group | None) -> None:
    if not isinstance(layer, LightningAttention):
        layer.__class__, layer.decays = LightningAttention, {}
    layer.group = group


__all__ = ["LightningAttention"]
