"""MiniMax's lightning layers through `leetdist.linear_attention`.

Another model with a constant decay needs a file like this one: a subclass of its layer, whose forward calls
`linear_attention` with `group=self.group`, and a handler that gives a layer that class and that group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from leetdist.api import linear_attention, linear_attention_step
from leetdist.inference.attend import attend
from leetdist.integrations.caches import ONE_DOCUMENT
from leetdist.integrations.minimax_cache import LightningCache
from leetdist.integrations.options import check_known
from leetdist.integrations.registry import register
from leetdist.sequence.site import warn

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

_MEANINGLESS = {"kept"}  # the mask that `attention_mask` says already


class LightningAttention(MiniMaxLightningAttention):
    """MiniMax's layer with the same weights and the same result, through leetdist's operator."""

    joins_states = True  # as in leetdist.integrations.ssd
    group: Group | None
    tile: int | None = None  # these two as those of leetdist.nn.LightningAttention
    exact: bool = False
    slopes: Tensor | None
    """(H,) fp32 on the CPU, once the buffer has its values."""

    def log_decay(self, device: torch.device) -> Tensor:
        """(H,) fp32."""
        if torch.compiler.is_compiling() and device not in self.decays:  # a graph keeps nothing outside of itself
            return -(self.get_slope_rate().float().flatten() if self.slopes is None else self.slopes).to(device)
        if device not in self.decays:
            if self.slopes is None:
                self.keep_slopes()
            with torch.inference_mode(False):  # kept for training
                slopes = self.formula() if self.slopes is None else self.slopes
                self.decays[device] = -slopes.to(device)
        return self.decays[device]

    def formula(self) -> Tensor:
        """(H,) fp32 slopes by the configuration."""
        with torch.inference_mode(False), torch.device("cpu"):  # also for models built on meta
            return self.get_slope_rate().float().flatten()  # without its `device`, new in transformers 5.23

    def keep_slopes(self) -> None:
        """Take the slopes that the model computes with: those of its buffer, which a checkpoint may bring; but where
        that is the formula in the model's dtype, as they were before they were rounded."""
        stored = self.slope_rate.detach()
        if not stored.is_meta:
            with torch.inference_mode(False):
                stored, formula = stored.flatten().cpu().clone(), self.formula()
                self.slopes = formula if torch.equal(formula.to(stored.dtype), stored) else stored.float()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.decays.clear()
        self.keep_slopes()

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
        check_known(kwargs, "MiniMax's lightning layer", besides=_MEANINGLESS)
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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        decay = self.log_decay(q.device)
        if cache is None and self.exact:
            return attend(q, k, v, decay, tile=self.tile, cu_seqlens=cu_seqlens, group=self.group)
        if cache is None:
            return linear_attention(q, k, v, decay, cu_seqlens=cu_seqlens, group=self.group, tile=self.tile), None
        if cu_seqlens is not None:
            raise ValueError(ONE_DOCUMENT)
        state = cache.get_linear_cache(self.layer_idx)
        if isinstance(cache, LightningCache) and self.group is None:  # it keeps the state itself
            o = cache.attend(self.layer_idx, q, k, v, decay, tile=self.tile, exact=self.exact)
            return o, cache.get_linear_cache(self.layer_idx)
        if self.exact:
            o, state = attend(q, k, v, decay, tile=self.tile, state=state, keep=True, group=self.group)
            cache.set_linear_cache(self.layer_idx, state)
            return o, state
        if isinstance(state, Tensor) and q.shape[2] == 1 and self.group is None:
            o, state = linear_attention_step(q, k, v, state, decay)
        else:
            state = state if isinstance(state, Tensor) else None
            o, state = linear_attention(
                q, k, v, decay, initial_state=state, return_state=True, group=self.group, tile=self.tile
            )
        cache.set_linear_cache(self.layer_idx, state)
        return o, state


def check(model: nn.Module) -> None:
    """ValueError for layers whose prompts and decoding have different decays; a warning for options that transformers
    keeps in the configuration and does not use."""
    for name, layer in model.named_modules():
        if not isinstance(layer, MiniMaxLightningAttention) or layer.slope_rate.is_meta:
            continue
        slopes, table = layer.slope_rate.detach()[:, 0].float(), layer.query_decay.detach()[..., 0].float()
        after = torch.arange(1, table.shape[1] + 1, device=table.device)
        # As far as bf16 tells, in which checkpoints keep both.
        if not torch.allclose(table, torch.exp(-slopes * after), rtol=0, atol=2**-7):
            raise ValueError(
                f"{name} decodes with the slopes of its buffer slope_rate, {slopes[:, 0].tolist()}, and reads prompts "
                f"with others, those of query_decay, {table[:, 0].log().neg().tolist()}: they must be the same"
            )
    config: Any = getattr(model, "config", None)
    differing = [
        f"{own} {theirs!r}, where {name} is {getattr(config, name, None)!r}"
        for own, name, theirs in _own_options(config)
        if theirs != getattr(config, name, None)
    ]
    if differing:
        warn(
            "the configuration has options of MiniMax-Text-01's own code, which transformers' MiniMax keeps and does "
            f"not use, and so does leetdist: {'; '.join(differing)}"
        )


def _own_options(config: Any) -> Iterator[tuple[str, str, Any]]:
    """(name in MiniMax-Text-01's own configuration, name that transformers uses, the value in its form)."""
    if (kinds := getattr(config, "attn_type_list", None)) is not None:
        yield "attn_type_list", "layer_types", ["full_attention" if kind else "linear_attention" for kind in kinds]
    if (width := getattr(config, "rotary_dim", None)) is not None:
        yield "rotary_dim", "head_dim", width
    for part in ("full_attention", "linear_attention", "mlp"):
        for factor in ("alpha", "beta"):
            if (value := getattr(config, f"layernorm_{part}_{factor}", None)) is not None:
                yield f"layernorm_{part}_{factor}", f"{part.replace('attention', 'attn')}_{factor}_factor", value


@register(MiniMaxLightningAttention, exact=True)
def _lightning(layer: Any, group: Group | None) -> None:
    if not isinstance(layer, LightningAttention):
        layer.__class__, layer.decays, layer.slopes = LightningAttention, {}, None
        layer.keep_slopes()
    layer.group = group


__all__ = ["LightningAttention"]
