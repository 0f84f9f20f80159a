"""Around the calls of a transformers model: what a shard needs, and what would be wrong on one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leetdist.integrations import caches
from leetdist.integrations.batches import checksums
from leetdist.integrations.documents import OFFSETS, offsets_of, shared_documents, starts_of, take_numbers, take_offsets
from leetdist.integrations.models import softmax
from leetdist.integrations.registry import Handler
from leetdist.sequence.agreement import gathered
from leetdist.sequence.grid import default_tile, shard_lengths
from leetdist.sequence.group import resolve
from leetdist.sequence.shard import cut, gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group
    from leetdist.sequence.transport import Transport

# What a call of the decoder stack may carry on shards; anything else is refused by name.
_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
_KNOWN = {*_TOKENS, *caches.NAMES, "cu_seqlens", "seq_idx", "use_cache"}
_MEANINGLESS = {
    "labels", "shift_labels", "num_items_in_batch", "return_dict", "output_hidden_states", "logits_to_keep",
    "cache_position",
}  # fmt: skip

# What tells of documents.
_OF_DOCUMENTS = ("position_ids", "seq_idx", *OFFSETS)

# What one compiled graph of a model on one device takes: nothing whose values have to be read.
_IN_A_GRAPH = {"input_ids", "inputs_embeds", "position_ids", "use_cache", *_MEANINGLESS}
_DOCUMENTS_IN_A_GRAPH = (
    "position_ids must count on by one in a compiled graph; tell packed documents by cu_seqlens, which are read outside"
)


@dataclass(frozen=True)
class Hearing:
    """What of a call's words reaches the layers."""

    documents: bool
    """cu_seqlens, all of them."""
    padding: bool
    """`kept`, those that are not given attention_mask by the model itself."""
    past_the_model: bool = False
    """Only where the decoder stack is told, to which the model around it does not hand all on."""


class Calls:
    """Around the forward of the decoder stack: documents told to its layers, shards checked, whole prompts cut.

    Training, and any call without a cache, gets shards from the caller. With a cache (`use_cache=True`, as `generate`
    calls it), every rank passes the whole prompt: it is cut here where every layer's cache is one that can be joined
    again, each rank then holds the whole caches, and decodes by itself. Only the last token's hidden state comes back
    from a prompt that was cut.
    """

    def __init__(
        self, model: Any, stack: Any, group: Group | None, handlers: dict[nn.Module, Handler], hearing: Hearing
    ) -> None:
        self.model, self.base, self.hearing = model, stack, hearing
        self.told: dict[str, Any] = {}  # to the model
        self.group, self.handlers = group, handlers
        transport = resolve(group) if group is not None else None
        self.rank, self.ranks = (0, 1) if transport is None else (transport.rank, transport.size)
        self.softmax = any(handler is softmax.give_group for handler in handlers.values())
        self.remote = [x for x in handlers if type(x).__module__.split(".")[0] not in ("transformers", "leetdist")]
        self.needs_masks = any(getattr(x, "model_masks_without_positions", False) for x in handlers)
        self.cuts_prompts = (stack is not model or model.base_model is model) and all(
            getattr(x, "joins_states", False) or handler is softmax.give_group for x, handler in handlers.items()
        )
        self.cuts_prompts &= not self.remote  # whose caches are their own
        self.prompt = self.alone = False
        self.tokens = 0  # of the prompt that was cut

    def install(self) -> None:
        if self.hearing.past_the_model:
            self.model.register_forward_pre_hook(self.hear, with_kwargs=True)
        self.base.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.group is not None:
            self.base.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.told = {name: kwargs[name] for name in _OF_DOCUMENTS if kwargs.get(name) is not None}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the decoder stack is called with instead of `args` and `kwargs`."""
        told = [name for name, x in kwargs.items() if x is not None and x is not False and name not in _IN_A_GRAPH]
        if torch.compiler.is_compiling() and self.group is None and not args and not told:
            positions = kwargs.get("position_ids")
            if positions is not None and positions.shape[1] > 1:
                # Values are not read while a graph is traced: it refuses documents itself, as it runs.
                torch._assert_async((positions.diff(dim=1) == 1).all(), _DOCUMENTS_IN_A_GRAPH)
            return args, kwargs
        return self._before(module, args, kwargs)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = caches.named(module, args, kwargs)
        call, self.told = {**call, **{name: x for name, x in self.told.items() if call.get(name) is None}}, {}
        cache = caches.cache_of(call)
        with_cache = cache is not None or call.get("use_cache") is True
        if self.group is None:
            offsets = take_offsets(call)
            if offsets is not None:
                call["cu_seqlens"] = offsets
            if not with_cache or (_count(call) > 1 and not isinstance(call.get("attention_mask"), dict)):
                self._tell_documents(call)
            if call.get("cu_seqlens") is not None:
                if with_cache:
                    raise ValueError(caches.ONE_DOCUMENT)
                call["use_cache"] = False  # or the configuration's default would make one
            return (), call
        self._check(call)
        if not with_cache:
            call["use_cache"] = False
            self._check_shard(call)
            mask = call.get("attention_mask")
            whole = mask if mask is None else gather_sequence(mask, 1, self.group)
            if whole is not None and bool(whole.all()):
                whole = call["attention_mask"] = None
            self._tell_documents(call)
        else:
            if call.get("cu_seqlens") is not None:
                raise ValueError(caches.ONE_DOCUMENT)
            whole = call.get("attention_mask")
            self._prepare_cached(call, cache)
        if whole is not None and not bool(whole.all()):
            self._must_hear("padding", self.hearing.padding)
            call["kept"] = whole.bool()
        return (), call

    @torch.compiler.disable
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        prompt, self.prompt = self.prompt, False
        if self.alone:
            self._give(self.group)
        if prompt and output is not None:
            caches.join(caches.cache_of(output), self.group, self.tokens)
            last = gather_sequence(output.last_hidden_state[:, -1:], 1, self.group)
            output.last_hidden_state = last[:, -1:]
        return output

    def _check(self, call: dict[str, Any]) -> None:
        """ValueError for what a shard cannot be computed with."""
        if call.get("output_router_logits"):
            raise ValueError(
                "output_router_logits: the auxiliary loss of the experts is no sum over tokens, so the mean of the "
                "ranks' losses is not the loss of the whole; it is not there for sharded sequences"
            )
        for name, value in call.items():
            if name not in _KNOWN and name not in _MEANINGLESS and value is not None and value is not False:
                raise ValueError(f"{name} is not known for a sharded sequence: leetdist.shard_batch cuts what is")
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("attention_mask must be (B, N) or None for a sharded sequence")
        if positions is not None and positions.ndim != 2:
            raise ValueError(f"position_ids must be (B or 1, N) for a sharded sequence, got {tuple(positions.shape)}")

    def _check_shard(self, call: dict[str, Any]) -> None:
        if call.get("position_ids") is None and "position_ids" in inspect.signature(type(self.base).forward).parameters:
            raise ValueError(
                "position_ids must be given, positions in the whole sequence: a shard's own would start from 0 on "
                "every rank; leetdist.shard_batch makes them"
            )
        if not _count(call):
            raise ValueError(
                f"input_ids: rank {self.rank} of {self.ranks} has no tokens, which the model's layers cannot take: "
                "share the sequence among fewer ranks, or take longer sequences"
            )

    def _tell_documents(self, call: dict[str, Any]) -> None:
        """Find documents by their numbers or positions, and see that all layers hear of them."""
        take_numbers(call, self.group)
        positions, mask, kept = call.get("position_ids"), call.get("attention_mask"), None
        if call.get("cu_seqlens") is None and positions is not None and positions.ndim == 2:
            rows = len(_tokens(call))
            if isinstance(mask, Tensor) and mask.ndim == 2:  # beside a cache it tells of the tokens there too
                kept = mask[:, -positions.shape[1] :]
            if self.group is not None:
                found = shared_documents(positions, rows, kept, self.group)
            else:
                starts = starts_of(positions.expand(rows, -1), kept)
                found = offsets_of(starts) if bool(starts.any()) else None
            if found is not None:
                call["cu_seqlens"] = found
        if call.get("cu_seqlens") is not None:
            self._must_hear("packed documents", self.hearing.documents)
            if self.group is None and self.softmax:
                self._tell_own_attention(call)

    def _tell_own_attention(self, call: dict[str, Any]) -> None:
        """transformers' own attention knows documents by positions, and only where there is no mask."""
        for layer in self.remote:  # which may know documents or not
            if self.handlers[layer] is softmax.give_group:
                raise ValueError(
                    f"packed documents: {type(layer).__name__} is softmax attention of {type(layer).__module__}, in "
                    "which leetdist keeps them apart on ranks alone; on one device pass each document by itself"
                )
        mask = call.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or not bool(mask.all())):
            raise ValueError("attention_mask: packed documents have no padding between them, leave it out")
        call["attention_mask"] = None
        if call.get("position_ids") is None:
            ends = call["cu_seqlens"].long()
            places = torch.arange(_count(call))
            places = places - ends.cpu()[torch.searchsorted(ends.cpu(), places, right=True) - 1]
            call["position_ids"] = places.to(_tokens(call).device)[None]
        if self.needs_masks:
            call["attention_mask"] = softmax.masks_of_documents(self.base, _tokens(call), call["position_ids"])

    def _must_hear(self, what: str, heard: bool) -> None:
        if not heard:
            raise ValueError(
                f"{type(self.base).__name__} does not hand what a call says of {what} on to all of its layers, which "
                "therefore leetdist cannot keep apart"
            )

    def _prepare_cached(self, call: dict[str, Any], cache: Any) -> None:
        count = self.tokens = _count(call)
        if self.softmax:
            caches.check_grows(cache)
        empty = caches.joinable(cache) and (cache is None or not caches.filled(cache))
        lengths = shard_lengths(count, self.ranks, self._tile() or default_tile(count))
        self.prompt = self.cuts_prompts and empty and min(lengths) > 0  # else there are too few to share
        self.prompt &= call.get("return_dict") is not False
        if self.prompt:
            if call.get("position_ids") is None:
                call["position_ids"] = torch.arange(count, device=_tokens(call).device)[None]
            transport = resolve(self.group)
            assert transport is not None
            _check_same(call, transport)
            for name in _TOKENS:
                if call.get(name) is not None:
                    call[name] = cut(call[name], 1, lengths, transport)
        else:
            self._give(None)

    def _tile(self) -> int | None:
        """What the layers' tile is pinned to."""
        tiles: list[Any] = [getattr(layer, "tile", None) for layer in self.handlers]
        return next((tile for tile in tiles if tile), None)

    def _give(self, group: Group | None) -> None:
        self.alone = group is None
        for layer, handler in self.handlers.items():
            handler(layer, group)


def _check_same(call: dict[str, Any], transport: Transport) -> None:
    """ValueError, on every rank, where a rank has another prompt. (Of embeddings only shapes are compared.)"""
    given = {name: call[name] for name in _TOKENS if call.get(name) is not None}
    mine = checksums({name: x[..., :0] if name == "inputs_embeds" else x for name, x in given.items()})
    everyone = gathered(mine, transport, "the prompt")
    for rank, theirs in enumerate(everyone):
        for name in {**theirs, **everyone[0]}:
            if theirs.get(name) != everyone[0].get(name):
                raise ValueError(
                    f"{name} of a prompt must be the same on every rank, but rank {rank}'s are not rank 0's; without a "
                    "cache (use_cache=False) a call takes shards"
                )


def _tokens(call: dict[str, Any]) -> Tensor:
    found = (call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None)
    tokens: Tensor | None = next(found, None)
    if tokens is None:
        raise ValueError("input_ids or inputs_embeds must be given")
    return tokens


def _count(call: dict[str, Any]) -> int:
    return _tokens(call).shape[1]


__all__ = ["Calls", "Hearing"]
