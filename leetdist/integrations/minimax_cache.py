"""The cache that transformers' MiniMaxForCausalLM generates with after `parallelize`: it also goes back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from leetdist.api import linear_attention, linear_attention_step
from leetdist.inference.attend import attend
from leetdist.inference.state import State
from leetdist.inference.steps import linear_attention_steps


@dataclass(frozen=True)
class _Forward:
    """What going back into a forward takes: the state before it, and its keys and values (B, H, T, D)."""

    before: Any
    k: Tensor
    v: Tensor
    log_decay: Tensor
    tile: int | None
    exact: bool


class LightningCache(MiniMaxCache):
    """Keys and values of the softmax layers and fp32 states of the lightning layers, of one batch.

    What transformers' own cannot do, this one does: tokens are counted where layer 0 is a lightning layer too, so that
    a cache can be continued by several tokens; beam search moves the states along with their beams; and `crop` takes
    back the last tokens, exactly, so that `assistant_model` and `prompt_lookup_num_tokens` work.

    `crop` reaches back to the `crop` before it, and needs the keys and values since then: `recording` keeps them.
    Decoding with drafts sets it; it costs those of the whole prompt until the first `crop`.

    Source: MiniMax-01, arXiv 2501.08313; drafts as in Leviathan et al., arXiv 2211.17192.
    """

    is_croppable = True
    linear_cache: list[Any]  # of lightning layers the state (a `State` of exact ones), of others an empty list

    def __init__(self, *, recording: bool = False) -> None:
        super().__init__()
        self.recording = recording
        self._seen: dict[int, int] = {}
        self._forwards: dict[int, list[_Forward]] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        tile: int | None = None,
        exact: bool = False,
    ) -> Tensor:
        """(B, H, T, D) outputs of T more tokens of a lightning layer; exact: with the bits of one call."""
        before = self.get_linear_cache(layer)
        if exact and before is None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return attend(q, k, v, log_decay, tile=tile)[0]  # training, where nobody goes on from the cache
        if exact:
            o, after = attend(q, k, v, log_decay, tile=tile, state=before, keep=True)
        elif before is not None and q.shape[2] == 1:
            o, after = linear_attention_step(q, k, v, before, log_decay)
        elif before is not None and self.recording:  # a draft's tokens give what they would give one by one
            after = before.clone()
            o = linear_attention_steps(q, k, v, after, log_decay)
        else:
            o, after = linear_attention(q, k, v, log_decay, initial_state=before, return_state=True, tile=tile)
        self.set_linear_cache(layer, after)
        self._seen[layer] = self._seen.get(layer, 0) + q.shape[2]
        if self.recording:
            self._forwards.setdefault(layer, []).append(_Forward(before, k, v, log_decay, tile, exact))
        return o

    def get_linear_cache(self, layer_idx: int) -> Any:
        """(B, H, D, D) fp32 (a `State` of an exact layer), or None before the first forward."""
        state = self.linear_cache[layer_idx] if layer_idx < len(self.linear_cache) else None
        return state if isinstance(state, (Tensor, State)) else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far: the same in all layers, told by one that counts them."""
        for cached in self.layers:
            if cached.is_initialized:
                return int(cached.get_seq_length())
        return max(self._seen.values(), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length + self.get_seq_length(), 0

    def activate_past_recording(self) -> None:
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, of those that came since the last `crop`."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative or 0, got {tokens_to_remove}")
        for layer in self._seen:
            self._go_back(layer, -tokens_to_remove)
        for cached in self.layers:
            if cached.is_initialized:
                cached.crop(tokens_to_remove)

    def _go_back(self, layer: int, removed: int) -> None:
        forwards = self._forwards.pop(layer, [])
        reach = sum(forward.k.shape[2] for forward in forwards)
        if removed > reach:
            raise RuntimeError(
                f"LightningCache can take back {reach} tokens in layer {layer}, and {removed} were asked for: it keeps "
                "those since the last crop, while `recording` is set"
            )
        self._seen[layer] -= removed
        while removed:
            forward = forwards.pop()
            kept = max(0, forward.k.shape[2] - removed)
            removed -= forward.k.shape[2] - kept
            self.set_linear_cache(layer, _state_after(forward, kept))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda _: beam_idx)
        self._cached("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda rows: torch.arange(rows).repeat_interleave(repeats))
        self._cached("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda rows: torch.arange(rows)[indices.cpu()])
        self._cached("batch_select_indices", indices)

    def _rows(self, chosen: Callable[[int], Tensor]) -> None:
        """Of every state the rows chosen, of so many."""

        def change(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.index_select(0, chosen(x.shape[0]).to(x.device))
            return x.select(chosen(x.boundary.shape[0])) if isinstance(x, State) else x

        self.linear_cache = [change(x) for x in self.linear_cache]
        self._forwards.clear()

    def _cached(self, method: str, argument: Any) -> None:
        """Calls a method of the softmax layers; lightning layers have a place among them that stays empty."""
        for cached in self.layers:
            if cached.is_initialized:
                getattr(cached, method)(argument)


def _state_after(forward: _Forward, kept: int) -> Any:
    """The state after the first `kept` tokens of a forward."""
    k, v = forward.k[:, :, :kept], forward.v[:, :, :kept]
    if forward.exact:
        no_query = torch.zeros_like(k)
        more = {"tile": forward.tile, "state": forward.before, "keep": True}
        return attend(no_query, k, v, forward.log_decay, **more)[1] if kept else forward.before
    if forward.before is None and kept:
        return linear_attention(torch.zeros_like(k), k, v, forward.log_decay, return_state=True, tile=forward.tile)[1]
    if forward.before is None:
        return torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], device=k.device)
    state = forward.before.clone()
    if kept:
        linear_attention_steps(torch.zeros_like(k), k, v, state, forward.log_decay)
    return state


def install(model: Any) -> None:
    """Make `generate`, and any forward that keeps a cache, keep a `LightningCache` where the caller passes none."""
    original = model._prepare_cache_for_generation

    # What transformers called `past_key_values` until 5.23.
    name = "cache" if "cache" in inspect.signature(type(model.base_model).forward).parameters else "past_key_values"

    @functools.wraps(original)
    def prepare(generation_config: Any, model_kwargs: dict[str, Any], mode: Any, *rest: Any) -> Any:
        if generation_config.use_cache is not False and model_kwargs.get(name) is None:
            drafts = mode == GenerationMode.ASSISTED_GENERATION or getattr(generation_config, "is_assistant", False)
            model_kwargs[name] = LightningCache(recording=bool(drafts))
        return original(generation_config, model_kwargs, mode, *rest)

    model._prepare_cache_for_generation = prepare

    def with_our_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A forward that would make transformers' own cache makes ours."""
        use_cache = kwargs.get("use_cache")
        use_cache = model.config.use_cache if use_cache is None else use_cache
        if use_cache and kwargs.get(name) is None:
            kwargs = {**kwargs, name: LightningCache()}
        return args, kwargs

    model.base_model.register_forward_pre_hook(with_our_cache, with_kwargs=True)


__all__ = ["LightningCache", "install"]
