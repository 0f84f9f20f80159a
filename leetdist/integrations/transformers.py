"""transformers models on shards: MiniMax, and decoders whose attention is softmax alone.

`parallelize` comes here for any transformers model. What happens to it:

- lightning layers (`MiniMaxLightningAttention`) compute through `leetdist.linear_attention`;
- softmax layers that call transformers' attention interface compute through `softmax_attention`; RoPE before them is
  right because `position_ids` are global, and the model refuses a call without them;
- the loss is the mean over all ranks' labels; mixture-of-experts layers treat each token alone and stay as they are.

To add another model with a constant decay, write a subclass of its layer whose forward calls `linear_attention` with
`group=self.group`, and register a handler that gives a layer that class and that group, as `_lightning` does below:
about 40 lines. A model whose layers are softmax attention through the interface needs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from leetdist.api import linear_attention, linear_attention_step
from leetdist.integrations import minimax_cache
from leetdist.integrations.loss import reduce_loss
from leetdist.integrations.minimax_cache import LightningCache
from leetdist.integrations.parallelize import handler_of, register
from leetdist.integrations.softmax import softmax_attention
from leetdist.sequence.grid import default_tile, shard_lengths
from leetdist.sequence.group import resolve
from leetdist.sequence.shard import gather_sequence, shard_sequence

if TYPE_CHECKING:
    from leetdist.mesh import Mesh
    from leetdist.sequence.group import Group

NAME = "leetdist"


class LightningAttention(MiniMaxLightningAttention):
    """MiniMax's layer with the same weights and the same result, through leetdist's operator."""

    group: Group | None
    decoding: bool

    def log_decay(self, device: torch.device) -> Tensor:
        """(H,) fp32: the slopes anew, because the model's buffers take the model's dtype."""
        if device not in self.decays:
            # Without its `device`, which transformers before 5.23 does not have.
            self.decays[device] = -self.get_slope_rate().float().flatten().to(device)
        return self.decays[device]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        qkv = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim)).transpose(1, 2)
        q, k, v = qkv.chunk(3, -1)
        decay = self.log_decay(q.device)
        state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
        group = None if self.decoding else self.group
        if isinstance(past_key_values, LightningCache) and group is None:
            o = past_key_values.attend(self.layer_idx, q, k, v, decay)
            state = past_key_values.get_linear_cache(self.layer_idx)
            past_key_values = None  # it has kept the state itself
        elif past_key_values is None:
            o = linear_attention(q, k, v, decay, cu_seqlens=cu_seqlens, group=group)
        elif state is not None and q.shape[2] == 1:
            o, state = linear_attention_step(q, k, v, state, decay)
        else:
            o, state = linear_attention(
                q, k, v, decay, initial_state=state, return_state=True, cu_seqlens=cu_seqlens, group=group
            )
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, state)
        o = self.norm(o.transpose(1, 2).flatten(2))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * o), state


@register(MiniMaxLightningAttention)
def _lightning(layer: Any, group: Group | None) -> None:
    layer.__class__ = LightningAttention
    layer.group, layer.decoding, layer.decays = group, False, {}


def _softmax(layer: Any, group: Group | None) -> None:
    layer.group, layer.decoding = group, False


def prepare(model: nn.Module, mesh: Mesh | None, group: Group | None) -> Callable[[], None]:
    """Make the model's softmax layers known to `parallelize`; returns what is to be done once all layers are."""
    config = getattr(model, "config", None)
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "linear_attention"}
    if group is not None and (kinds or getattr(config, "is_encoder_decoder", False)):
        what = f"layers of the types {sorted(kinds)}" if kinds else "an encoder"
        raise ValueError(f"{type(model).__name__} has {what}, which leetdist does not know how to shard")
    for module in model.modules():
        if handler_of(module) is None and _calls_the_interface(module):
            register(type(module))(_softmax)

    def finish() -> None:
        if mesh is not None and type(model).__name__.endswith("ForCausalLM"):
            model.loss_function = _Loss(mesh, sharded=group is not None)  # type: ignore[assignment]
        if group is not None:
            assert isinstance(model, PreTrainedModel)
            hooks = _Hooks(model.base_model, group)
            if hooks.softmax:
                AttentionInterface.register(NAME, _attend)
                model.set_attn_implementation(NAME)
            model.base_model.register_forward_pre_hook(hooks.before, with_kwargs=True)
            model.base_model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
        if hasattr(model, "generate") and any(isinstance(m, LightningAttention) for m in model.modules()):
            minimax_cache.install(model)

    return finish


def _calls_the_interface(module: nn.Module) -> bool:
    """Whether a layer is causal softmax attention through transformers' AttentionInterface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return getattr(module, "is_causal", False) is True and "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers' attention interface calls: (B, H, n, D) in, (B, n, H, D) out."""
    if options.get("dropout") or options.get("sliding_window"):
        raise ValueError(
            f"{type(module).__name__}: dropout and sliding windows are not there under leetdist, got dropout "
            f"{options.get('dropout')}, sliding_window {options.get('sliding_window')}"
        )
    cu_seqlens = options.get("cu_seqlens")
    o = softmax_attention(
        query, key, value, None if module.decoding else module.group,
        scale=options.get("scaling"), kept=options.get("kept"),
        boundaries=None if cu_seqlens is None else tuple(cu_seqlens.tolist()),
    )  # fmt: skip
    return o.transpose(1, 2).contiguous(), None


class _Loss:
    """The loss of a causal language model over all ranks, in place of the model's own."""

    def __init__(self, mesh: Mesh, sharded: bool) -> None:
        self.mesh, self.sharded = mesh, sharded

    @torch.compiler.disable
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            if self.sharded:
                raise ValueError(
                    "shift_labels must be given: the label of a shard's last token is on the next rank, so labels are "
                    "shifted before they are cut; leetdist.shard_batch does both"
                )
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
        target = shift_labels.reshape(-1).to(logits.device)
        total = F.cross_entropy(logits.float().view(-1, vocab_size), target, ignore_index=ignore_index, reduction="sum")
        counted = (target != ignore_index).sum()
        return reduce_loss(total, counted, self.mesh, total_tokens=num_items_in_batch)


class _Hooks:
    """Around the forward of the decoder stack: what a shard needs, and whole prompts for `generate`.

    Training, and any call without a cache, gets shards from the caller. With a cache (`use_cache=True`, as `generate`
    calls it), every rank passes the whole prompt: it is cut here, each rank then holds the whole caches, and decodes by
    itself. Only the last token's hidden state comes back from a prompt.
    """

    def __init__(self, base: nn.Module, group: Group) -> None:
        transport = resolve(group)
        assert transport is not None
        self.group, self.rank, self.ranks = group, transport.rank, transport.size
        layers: list[Any] = [module for module in base.modules() if hasattr(module, "decoding")]
        self.layers = layers
        self.softmax = [layer for layer in layers if not isinstance(layer, LightningAttention)]
        self.prompt = False

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        call.pop(next(iter(call)))
        kwargs = {**call.pop("kwargs", {}), **call}
        if kwargs.get("output_router_logits"):
            raise ValueError(
                "output_router_logits: the auxiliary loss of the experts is no sum over tokens, so the mean of the "
                "ranks' losses is not the loss of the whole; it is not there for sharded sequences"
            )
        cache = kwargs.get("past_key_values")
        tokens = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
        mask, local = kwargs.get("attention_mask"), False
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("attention_mask must be (B, N) or None for a sharded sequence")
        if cache is None and kwargs.get("use_cache") is not True:
            kwargs["use_cache"] = False
            if kwargs.get("position_ids") is None:
                raise ValueError(
                    "position_ids must be given, positions in the whole sequence: a shard's own would start from 0 on "
                    "every rank; leetdist.shard_batch makes them"
                )
            if not tokens.shape[1]:
                raise ValueError(
                    f"input_ids: rank {self.rank} of {self.ranks} has no tokens, which the model's layers cannot take: "
                    "share the sequence among fewer ranks, or take longer sequences"
                )
            whole = mask if mask is None else gather_sequence(mask, 1, self.group)
        else:
            filled = cache is not None and (cache.get_seq_length() > 0 or any(map(len, _linear(cache))))
            count = tokens.shape[1]  # too few to share, if a rank would have none
            local = filled or not min(shard_lengths(count, self.ranks, default_tile(count)))
            self.prompt, whole = not local, mask
            if self.prompt:
                if kwargs.get("position_ids") is None:
                    kwargs["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None]
                for name in ("input_ids", "inputs_embeds", "position_ids", "attention_mask"):
                    if kwargs.get(name) is not None:
                        kwargs[name] = shard_sequence(kwargs[name], 1, self.group)
        for layer in self.layers:
            layer.decoding = local
        if whole is not None and not bool(whole.all()):
            kwargs["kept"] = whole.bool()
        return (), kwargs

    @torch.compiler.disable
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        prompt, self.prompt = self.prompt, False
        for layer in self.layers:
            layer.decoding = False
        if prompt and output is not None:
            for layer in self.softmax:
                cached = output.past_key_values.layers[layer.layer_idx]
                cached.keys, cached.values = (gather_sequence(x, 2, self.group) for x in (cached.keys, cached.values))
            last = gather_sequence(output.last_hidden_state[:, -1:], 1, self.group)
            output.last_hidden_state = last[:, -1:]
        return output


def _linear(cache: Any) -> list[Any]:
    """The states that a MiniMaxCache holds; other caches have none."""
    return getattr(cache, "linear_cache", [])


__all__ = ["LightningAttention", "prepare"]
