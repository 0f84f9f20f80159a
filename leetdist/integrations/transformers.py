"""transformers models on shards: MiniMax, and decoders whose attention is softmax alone.

`parallelize` comes here for any transformers model. What happens to it:

- lightning layers (`MiniMaxLightningAttention`) compute through `leetdist.linear_attention` (models/minimax.py);
- softmax layers that call transformers' attention interface compute through `softmax_attention` (models/softmax.py);
  RoPE before them is right because `position_ids` are global, and the model refuses a call without them;
- the loss is the mean over all ranks' labels; mixture-of-experts layers treat each token alone and stay as they are;
- all else, and whether it is so, is tried on a small copy (probe.py), and refused where parts differ from the whole.

`tests/integrations/model_table.txt` says what came of it for every causal language model of transformers.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leetdist.integrations import minimax_cache, probe
from leetdist.integrations.calls import Calls, ModelLoss, Outputs
from leetdist.integrations.models import minimax, softmax
from leetdist.integrations.models.minimax import LightningAttention
from leetdist.integrations.registry import Handler

if TYPE_CHECKING:
    from leetdist.mesh import Mesh
    from leetdist.sequence.group import Group

_LAYER_TYPES = {"full_attention", "linear_attention", "dense", "sparse", "moe"}


class Integration:
    """What `parallelize` does with one transformers model: all that may be refused first, then `install`."""

    def __init__(self, root: nn.Module, model: Any, mesh: Mesh | None, group: Group | None) -> None:
        self.root, self.model, self.mesh, self.group = root, model, mesh, group
        self.stack: Any = model  # the innermost module through which every call of the layers goes
        self.hears = True  # whether a call's word on documents and padding reaches every layer
        if hasattr(model, "_leetdist_mesh"):
            raise ValueError(f"{type(model).__name__} is parallelized already: build or load it anew for another mesh")
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
        parameters = inspect.signature(type(model).forward).parameters
        copies: list[Any] = []

        takes_more = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())

        def call(tried: Any, part: slice, *, packed: bool, own: bool) -> Any:
            inputs: dict[str, Any] = {
                "input_ids": probe.token_ids(getattr(embedding, "num_embeddings", 2))[:, part],
                "position_ids": torch.arange(probe.TOKENS)[None, part],
                "use_cache": False,
            }
            if own and part.stop - part.start == probe.TOKENS:  # the model's own positions must be those
                del inputs["position_ids"]
            inputs = {name: value for name, value in inputs.items() if name in parameters}
            if packed:
                inputs["cu_seqlens"] = torch.tensor([0, part.stop - part.start])
            return tried(**inputs)

        calls: dict[str, int] = {}

        def prepare(tried: Any) -> None:
            copies.append(tried)
            calls.clear()
            for name in self._stacks(apart):
                tried.get_submodule(name).register_forward_pre_hook(
                    lambda *_, n=name: calls.update({n: calls.get(n, 0) + 1})
                )
            for config in (tried.config, tried.config.get_text_config()):
                if getattr(config, "output_router_logits", False):
                    config.output_router_logits = False  # of all tokens; asked for, they are refused at the call
            softmax.install_alone(tried, strict=self.group is not None)
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
        self.stack = model.get_submodule(max((x for x in calls if calls[x] == calls[""]), key=len, default=""))
        self.hears = packed and all(getattr(x, "hears_of_documents", True) for x in copies[-1].modules())
        return found

    def _stacks(self, layers: list[nn.Module]) -> list[str]:
        """Names of the modules that take tokens, and hold all of the layers."""
        names = [name for name, module in self.model.named_modules() if module in set(layers)]
        return [
            name
            for name, module in self.model.named_modules()
            if {"input_ids", "inputs_embeds"} & inspect.signature(type(module).forward).parameters.keys()
            and all(not name or layer.startswith(name + ".") for layer in names)
        ]

    def install(self, handlers: dict[nn.Module, Handler]) -> None:
        """What is to be done to the model once its layers have their group."""
        model, mesh, group = self.model, self.mesh, self.group
        inside = set(model.modules())
        handlers = {layer: handler for layer, handler in handlers.items() if layer in inside}
        model._leetdist_mesh = mesh
        if mesh is not None:
            if getattr(model.loss_function, "__name__", "") == "ForCausalLMLoss":
                model.loss_function = ModelLoss(mesh, sharded=group is not None)
            # Or transformers' Trainer would multiply the loss by the number of processes once more.
            model.accepts_loss_kwargs = False
            Outputs(model, sharded=group is not None).install()
        ours = any(isinstance(x, LightningAttention) for x in handlers)
        if group is not None or ours:
            Calls(model, self.stack, group, handlers, self.hears).install()
        if group is not None and any(handler is softmax.give_group for handler in handlers.values()):
            softmax.install(model)
        if ours and hasattr(model, "generate"):
            minimax_cache.install(model)


__all__ = ["Integration", "LightningAttention"]
