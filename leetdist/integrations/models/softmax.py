"""Softmax layers that call transformers' attention interface: `softmax_attention` in place of theirs.

What a layer asks of attention by options that are not known here (biases, windows, masks of its own; soft caps and
sinks are served) is refused by name: a result without them would be another model's.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    create_causal_mask,
    packed_sequence_mask_function,
)

from leetdist.integrations.options import HANDED_TO_ALL
from leetdist.integrations.softmax import softmax_attention

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

NAME = "leetdist"
ALONE = "leetdist_alone"
"""An attention in which no token sees another: `integrations.probe` finds what else mixes tokens by it."""

_REMAPPED = "remap_positions_for_packed_sequence"  # of the newer transformers

# Options that say how, and not what, or that others serve: positions are in q and k by now, the cache in k and v.
_MEANINGLESS = HANDED_TO_ALL | {"position_embeddings", "labels", "layer_idx", "deterministic", "training"}
_SERVED = {"scaling", "cu_seqlens", "kept", "softcap", "s_aux"}


def calls_the_interface(module: nn.Module) -> bool:
    """Whether a layer is causal softmax attention through transformers' AttentionInterface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return getattr(module, "is_causal", False) is True and "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())


def give_group(layer: Any, group: Group | None) -> None:
    layer.group = group


def install(model: Any) -> None:
    """Makes the model's layers call `softmax_attention`."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask_of_its_own)
    model.set_attn_implementation(NAME)


def install_alone(model: Any, *, strict: bool) -> None:
    """Makes the model's layers keep tokens apart; strict: and refuse what `softmax_attention` would."""
    name = ALONE if strict else ALONE + "_whatever"
    AttentionInterface.register(name, _attend_alone_strictly if strict else _attend_alone)
    AttentionMaskInterface.register(name, _mask_of_its_own if strict else _no_mask)
    model.set_attn_implementation(name)


def check_options(module: nn.Module, mask: Tensor | None, options: dict[str, Any]) -> None:
    """ValueError if a layer asks for what `softmax_attention` does not do."""
    kind = type(module).__name__
    if not getattr(module, "is_causal", False):
        raise ValueError(f"{kind} attends to later tokens too (is_causal is not set)")
    refused: dict[str, Any] = {} if mask is None else {"a mask of the model's own": mask}
    for name, value in options.items():
        harmless = value is None or name in _SERVED or name in _MEANINGLESS
        harmless |= name == "dropout" and not value
        harmless |= name == "is_causal" and value is True
        harmless |= name == "output_attentions" and not value
        if not harmless:
            refused[name] = value
    if refused:
        shown = ", ".join(f"{k}={v if isinstance(v, bool | int | float | str) else '...'}" for k, v in refused.items())
        raise ValueError(f"{kind} asks of its attention what leetdist's does not do on shards: {shown}")


def masks_of_documents(stack: Any, tokens: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """What a hybrid makes of positions that start anew, if it does: a mask for each kind of its layers."""
    like = torch.empty(*tokens.shape[:2], 0, dtype=stack.dtype, device=tokens.device)
    cache = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
    mask = create_causal_mask(
        config=stack.config, inputs_embeds=like, attention_mask=None, position_ids=position_ids, **{cache: None}
    )
    if mask is None:
        raise ValueError(
            f"{type(stack).__name__} tells its softmax layers of packed documents by a mask alone, which the attention "
            f"{stack.config._attn_implementation!r} does not take; call set_attn_implementation('sdpa')"
        )
    return {"full_attention": mask, "linear_attention": None}


def _no_mask(**_: Any) -> None:
    """transformers asks for no masks."""


@torch.compiler.disable  # it looks into closures, which a traced function does not show
def _mask_of_its_own(*, mask_function: Any, device: Any = None, **_: Any) -> Tensor | None:
    """What transformers asks for masks: none, because `softmax_attention` makes its own, of causality, padding and
    documents; where the model hides anything else, something for `check_options` to refuse if a layer uses it."""
    return None if _plainly_causal(mask_function) else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _plainly_causal(function: Any) -> bool:
    """Whether a mask is transformers' causal one, also with packed documents, which come as functions around it."""
    if function is causal_mask_function:
        return True
    name = getattr(function, "__qualname__", "").split(".")[0]
    if name == packed_sequence_mask_function.__name__:
        return True
    if name not in (and_masks.__name__, _REMAPPED):
        return False
    inner = [x for cell in function.__closure__ or () for x in tree_leaves(cell.cell_contents) if callable(x)]
    return bool(inner) and all(map(_plainly_causal, inner))


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers' attention interface calls: (B, H, n, D) in, (B, n, H, D) out."""
    check_options(module, attention_mask, options)
    cu_seqlens = options.get("cu_seqlens")
    o = softmax_attention(
        query, key, value, module.group,
        scale=options.get("scaling"), softcap=options.get("softcap"), sinks=options.get("s_aux"),
        kept=options.get("kept"),
        boundaries=None if cu_seqlens is None else tuple(cu_seqlens.tolist()),
    )  # fmt: skip
    return o.transpose(1, 2).contiguous(), None


def _attend_alone_strictly(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    check_options(module, attention_mask, options)
    return _attend_alone(module, query, key, value, attention_mask, **options)


def _attend_alone(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Each token's own value, changed by its own query and key, so that what is wrong in one of them shows."""
    module.hears_of_documents = "cu_seqlens" in options
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    width = torch.linspace(-1, 1, query.shape[-1], device=query.device, dtype=query.dtype)
    seen = torch.tanh((query * width).sum(-1, keepdim=True) + (key * width.flip(0)).sum(-1, keepdim=True))
    return (value * (1.5 + seen)).transpose(1, 2).contiguous(), None


__all__ = ["calls_the_interface", "give_group", "install", "install_alone", "masks_of_documents"]
