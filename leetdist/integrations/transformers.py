"""transformers models on shards: families with recurrent layers, and decoders whose attention is softmax alone.

`parallelize` comes here for any transformers model. What happens to it:

- recurrent layers (MiniMax's lightning attention, Mamba-2's in many families, xLSTM's) compute through leetdist's
  operators (models/, a file a family);
- softmax layers that call transformers' attention interface compute through `softmax_attention` (models/softmax.py);
  RoPE before them is right because `position_ids` are global, and the model refuses a call without them;
- the loss is the mean over all ranks' labels; mixture-of-experts layers treat each token alone and stay as they are;
- all else, and whether it is so, is tried on a small copy (probe.py), and refused where parts differ from the whole.

`tests/integrations/model_table.txt` says what came of it for every causal language model of transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leetdist.integrations import minimax_cache, models, probe
from leetdist.integrations.calls import Calls, Hearing
from leetdist.integrations.model_loss import ModelLoss, Outputs
from leetdist.integrations.models import minimax, softmax
from leetdist.integrations.models.minimax import LightningAttention
from leetdist.integrations.registry import Handler

if TYPE_CHECKING:
    from leetdist.mesh import Mesh
    from leetdist.sequence.group import Group

_LAYER_TYPES = {"full_attention", "linear_attention", "hybrid", "dense", "sparse", "moe", "mlp"}


class Integration:
    """What `parallelize` does with one transformers model: all that may be refused first, then `install`."""

    def __init__(self, root: nn.Module, model: Any, mesh: Mesh | None, group: Group | None) -> None:
        self.root, self.model, self.mesh, self.group = root, model, mesh, group
        self.stack: Any = model  # the innermost module through which every call of the layers goes
        self.hearing = Hearing(documents=True, padding=True)
        minimax.check(model)
        if group is not None:
            self._check_configuration()

    def _check_configuration(self) -> None:
        name, config = type(self.model).__name__, self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{name} has an encoder, which leetdist does not know how to shard")
        if kinds := set(getattr(config, "layer_types", None) or []) - _LAYER_TYPES:
            raise ValueError(
                f"{name} has layers of the types {sorted(kinds)}, which leetdist does not know how to shard"
            )
        for child, module in self.model.named_modules():
            told: Any = getattr(module, "rope_type", None)
            for kind in told.values() if isinstance(told, dict) else [told]:
                if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):  # as transformers asks
                    raise ValueError(
                        f"{name}: the rotations of {child} have rope_type {kind!r}, whose frequencies depend on the "
                        "last position of a call, which each shard has of its own; others, such as 'yarn', do not"
                    )
        if any(getattr(x, "is_prompt_learning", False) for x in getattr(self.root, "peft_config", {}).values()):
            raise ValueError(f"{name}: PEFT's learnt prompts lengthen each rank's shard; adapters of weights are taken")

    def softmax_layers(self, known: dict[nn.Module, Handler]) -> dict[nn.Module, Handler]:
        layers = (x for x in self.model.modules() if x not in known and softmax.calls_the_interface(x))
        return dict.fromkeys(layers, softmax.give_group)

    def refused(self, handlers: dict[nn.Module, Handler], harmless: tuple[type[nn.Module], ...]) -> dict[str, str]:
        """Name -> class or reason of what mixes tokens in the model; what is harmless is taken not to."""
        model = self.model
        if isinstance(model, harmless):
            return {}
        apart = [x for x in model.modules() if x in handlers or isinstance(x, harmless)]
        embedding = model.get_input_embeddings()
        parameters = _parameters(model)
        copies: list[Any] = []

        takes_more = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
        # Without it, a model that passes it on would make a cache.
        passed_on = {"use_cache"} if takes_more and "use_cache" in _parameters(model.base_model) else set()

        def call(tried: Any, part: slice, *, packed: bool, own: bool) -> Any:
            inputs: dict[str, Any] = {
                "input_ids": probe.token_ids(getattr(embedding, "num_embeddings", 2))[:, part],
                "position_ids": torch.arange(probe.TOKENS)[None, part],
                "use_cache": False,
            }
            if own and part.stop - part.start == probe.TOKENS:  # the model's own positions must be those
                del inputs["position_ids"]
            inputs = {name: value for name, value in inputs.items() if name in parameters or name in passed_on}
            if packed:
                inputs["cu_seqlens"] = torch.tensor([0, part.stop - part.start])
            return tried(**inputs)

        calls: dict[str, int] = {}

        def tell(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            tokens = args[0] if args else kwargs["input_ids"]
            return args, {"cu_seqlens": torch.tensor([0, tokens.shape[1]]), **kwargs}

        def prepare(tried: Any, told: str | None = None) -> None:
            copies.append(tried)
            calls.clear()
            if told is not None:
                tried.get_submodule(told).register_forward_pre_hook(tell, with_kwargs=True)
            for name in self._stacks(apart):
                tried.get_submodule(name).register_forward_pre_hook(
                    lambda *_, n=name: calls.update({n: calls.get(n, 0) + 1})
                )
            for config in (tried.config, tried.config.get_text_config()):
                if getattr(config, "output_router_logits", False):
                    config.output_router_logits = False  # of all tokens; asked for, they are refused at the call
            softmax.install_alone(tried, strict=self.group is not None)
            models.prepare(tried)
            if hasattr(tried, "set_experts_implementation"):
                tried.set_experts_implementation("eager")

        def tried(*, packed: bool, own: bool) -> dict[str, str]:
            return probe.mixing(model, apart, call=functools.partial(call, packed=packed, own=own), prepare=prepare)

        name = type(model).__name__
        found: dict[str, str] = {}
        for packed in (True, False) if takes_more else (False,):
            try:
                found = tried(packed=packed, own=True)
                if found and not tried(packed=packed, own=False):
                    found = {"": f"{name}, whose positions are not 0, 1, 2, ... where a call gives none"}
                break
            except probe.Untried as reason:
                found = {"": f"{name}, which could not be tried: {reason}"}
        stack = max((x for x in calls if calls[x] == calls[""]), key=len, default="")
        self.stack = model.get_submodule(stack)
        self.hearing = _hearing(copies[-1]) if packed else Hearing(documents=False, padding=False)
        if packed and stack and not self.hearing.documents:  # the model may keep it from the stack
            more = functools.partial(prepare, told=stack)
            with contextlib.suppress(probe.Untried):
                probe.mixing(model, apart, call=functools.partial(call, packed=True, own=True), prepare=more)
                self.hearing = _hearing(copies[-1])
            self.hearing = dataclasses.replace(self.hearing, past_the_model=True)
        return found

    def _stacks(self, layers: list[nn.Module]) -> list[str]:
        """Names of the modules that take tokens, and hold all of the layers."""
        names = [name for name, module in self.model.named_modules() if module in set(layers)]
        return [
            name
            for name, module in self.model.named_modules()
            if {"input_ids", "inputs_embeds"} & _parameters(module).keys()
            and all(not name or layer.startswith(name + ".") for layer in names)
        ]

    def install(self, handlers: dict[nn.Module, Handler]) -> None:
        """What is to be done to the model once its layers have their group."""
        model, mesh, group = self.model, self.mesh, self.group
        inside = set(model.modules())
        handlers = {layer: handler for layer, handler in handlers.items() if layer in inside}
        if mesh is not None:
            if getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss":
                model.loss_function = ModelLoss(mesh, sharded=group is not None)
            # Or transformers' Trainer would multiply the loss by the number of processes once more.
            model.accepts_loss_kwargs = False
            Outputs(model, sharded=group is not None).install()
        if group is not None or any(getattr(x, "joins_states", False) for x in handlers):
            Calls(model, self.stack, group, handlers, self.hearing).install()
        if group is not None and any(handler is softmax.give_group for handler in handlers.values()):
            softmax.install(model)
        models.prepare(model)
        if any(isinstance(x, LightningAttention) for x in handlers) and hasattr(model, "generate"):
            minimax_cache.install(model)


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(module).forward).parameters


def _hearing(tried: nn.Module) -> Hearing:
    """Of a copy that was called with documents; layers that `joins_states` get a mask of padding from the model."""
    heard = {x: x.hears_of_documents for x in tried.modules() if hasattr(x, "hears_of_documents")}
    return Hearing(
        documents=all(heard.values()),
        padding=all(hears for x, hears in heard.items() if not getattr(x, "joins_states", False)),
    )


__all__ = ["Integration", "LightningAttention"]
