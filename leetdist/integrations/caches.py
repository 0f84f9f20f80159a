"""The caches of transformers models: by whichever name, whether they hold tokens, and whether shards' can be joined."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from leetdist.sequence.shard import gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

# What was called `past_key_values`, or by Mamba-2's models `cache_params`, is `cache` since transformers 5.24.
NAMES = ("cache", "past_key_values", "cache_params")
ONE_DOCUMENT = "cu_seqlens: a cache holds one document a row, and packed documents are several"


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; a cache by the one that the module knows."""
    signature = inspect.signature(type(module).forward)
    if "cache" in signature.parameters:
        kwargs = dict(kwargs)
        old = [kwargs.pop(name, None) for name in NAMES[1:]]
        if (cache := next((x for x in old if x is not None), None)) is not None and kwargs.get("cache") is None:
            kwargs["cache"] = cache
    call = signature.bind(module, *args, **kwargs).arguments
    call.pop(next(iter(call)))
    rest = next((name for name, x in signature.parameters.items() if x.kind is inspect.Parameter.VAR_KEYWORD), "")
    return {**call.pop(rest, {}), **call}


def cache_of(told: Any) -> Any:
    """The cache of a call, or of what a model returns."""
    return next((told[name] for name in NAMES if told.get(name) is not None), None)


def filled(cache: Any) -> bool:
    """Whether a cache holds tokens; one of states alone does not count them."""
    if hasattr(cache, "rnn_state"):  # xLSTM's
        return bool(cache.seqlen_offset > 0)
    states = any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers)
    keys = any(getattr(layer, "keys", None) is not None and layer.get_seq_length() > 0 for layer in cache.layers)
    linear = getattr(cache, "linear_cache", [])  # of other layers an empty list
    return states or keys or any(not isinstance(x, list) or x for x in linear)


def joinable(cache: Any) -> bool:
    """Whether a prompt's cache can be joined from shards: plain keys and values a layer, states that are whole."""
    from transformers import cache_utils
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    if cache is None or type(cache).__module__ == "transformers.models.xlstm.modeling_xlstm":
        return True
    known = type(cache) is cache_utils.DynamicCache or isinstance(cache, MiniMaxCache)
    names = ("DynamicLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "DummyLayer")
    kinds = {getattr(cache_utils, name, None) for name in names}  # DummyLayer is none of the oldest transformers
    return known and not getattr(cache, "offloading", False) and all(type(x) in kinds for x in cache.layers)


def join(cache: Any, group: Group | None, tokens: int) -> None:
    """Give each rank the keys and values of the whole prompt, of so many tokens; states are whole already."""
    for layer in getattr(cache, "layers", ()):
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = (gather_sequence(x, 2, group) for x in (layer.keys, layer.values))
    if hasattr(cache, "seqlen_offset"):
        cache.seqlen_offset.fill_(tokens)


def check_grows(cache: Any) -> None:
    """ValueError for a cache whose keys are as many as there may once be, the last of them of no token yet."""
    from transformers.cache_utils import StaticLayer

    if any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", [])):
        raise ValueError(
            f"{type(cache).__name__} has a fixed length, where leetdist's softmax attention on ranks takes all keys "
            "for those of tokens: leave cache_implementation out, or use DynamicCache"
        )


__all__ = ["NAMES", "ONE_DOCUMENT", "cache_of", "check_grows", "filled", "join", "joinable", "named"]
