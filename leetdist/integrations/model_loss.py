"""The loss of a transformers model on ranks: the mean over all of them, in place of the model's own, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leetdist.integrations import caches
from leetdist.integrations.loss import reduce_loss
from leetdist.mesh import all_sum, all_transports

if TYPE_CHECKING:
    from leetdist.mesh import Mesh

_UNSHIFTED = (
    "shift_labels must be given: the label of a shard's last token is on the next rank, so labels are "
    "shifted before they are cut; leetdist.shard_batch does both"
)


class ModelLoss:
    """The loss of a causal language model over all ranks, in place of the model's own."""

    def __init__(self, mesh: Mesh, sharded: bool) -> None:
        self.mesh, self.sharded = mesh, sharded
        self.last: Tensor | None = None
        self.share = False

    @contextmanager
    def shares(self) -> Iterator[None]:
        """A call with `num_items_in_batch` gives this rank's part of the mean, for who multiplies it by the ranks."""
        self.share = True
        try:
            yield
        finally:
            self.share = False

    @torch.compiler.disable
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            if self.sharded:
                raise ValueError(_UNSHIFTED)
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if logits.shape[:-1] != shift_labels.shape:
            raise ValueError(
                f"shift_labels must have a label for each of the logits {tuple(logits.shape)}, "
                f"got {tuple(shift_labels.shape)}"
            )
        target = shift_labels.reshape(-1).to(logits.device)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        counted = (target != ignore_index).sum()
        if self.share and num_items_in_batch is not None:
            self.last = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp_min(1)
            return self.last
        if num_items_in_batch is not None:
            everyone = int(all_sum(counted, all_transports(self.mesh)))
            if int(num_items_in_batch) < everyone:
                raise ValueError(
                    f"num_items_in_batch must be the labels that count over all ranks and micro-batches of a step, got "
                    f"{int(num_items_in_batch)} where these ranks have {everyone}: sum it over the ranks"
                )
        self.last = reduce_loss(total, counted, self.mesh, total_tokens=num_items_in_batch)
        return self.last


class Outputs:
    """Around the whole model: a loss that is not the mean over all ranks, or tokens left out, are errors."""

    def __init__(self, model: Any, sharded: bool) -> None:
        self.model, self.sharded = model, sharded

    def install(self) -> None:
        self.model.register_forward_pre_hook(self.before, with_kwargs=True)
        self.model.register_forward_hook(self.after, with_kwargs=True)

    @torch.compiler.disable
    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        cached = kwargs.get("use_cache") or any(kwargs.get(x) is not None for x in ("cache", "past_key_values"))
        if self.sharded and cached and kwargs.get("labels") is not None:
            raise ValueError(
                "labels: a call with a cache takes the whole prompt on every rank, and has no loss on shards; learnt "
                "prefixes of PEFT come as a cache, adapters of weights do not"
            )
        keep = kwargs.get("logits_to_keep")
        if self.sharded and not cached and (isinstance(keep, Tensor) or keep):
            raise ValueError(
                "logits_to_keep counts from the end of the sequence, which only the last rank holds; if this is "
                "generate(use_cache=False), leave that out: a call without a cache takes shards"
            )

    @torch.compiler.disable
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = caches.named(module, args, kwargs)
        if call.get("labels") is None:
            return
        if getattr(output, "log_probs", None) is not None:  # trl's fused head: the loss is its trainer's, of these
            if self.sharded and call.get("shift_labels") is None:
                raise ValueError(_UNSHIFTED)
            output.loss = None
            return
        loss = output[0] if isinstance(output, tuple) else output.loss
        ours = getattr(module, "loss_function", None)
        last = ours.last if isinstance(ours, ModelLoss) else None
        if isinstance(ours, ModelLoss):
            ours.last = None
        if last is None or loss is not last:
            raise ValueError(
                f"{type(module).__name__} computes a loss of its own from labels, which is not the mean over all "
                "ranks: call it without labels, and give leetdist.reduce_loss the sum of the tokens' losses"
            )


__all__ = ["ModelLoss", "Outputs"]
