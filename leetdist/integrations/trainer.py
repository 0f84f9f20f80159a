"""transformers' Trainer for a model that `parallelize` has sharded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils._pytree import tree_map

from leetdist.integrations.batches import IGNORED, shard_batch
from leetdist.integrations.model_loss import ModelLoss
from leetdist.integrations.record import records_of
from leetdist.mesh import DATA_NAMES, all_sum, all_transports, data_rank, dimensions_of, sequence_group
from leetdist.sequence.group import resolve
from leetdist.sequence.shard import gather_sequence


class Trainer(transformers.Trainer):
    """transformers' Trainer, whose batches are dealt to the data-parallel ranks and cut for those that share a row.

    Losses, gradient norms, evaluations and checkpoints are those of one process: with gradient accumulation, packed
    rows (`DataCollatorWithFlattening`), lengths that differ and labels masked anywhere, under DDP as Trainer sets it
    up. Losses and gradient norms are so with its settings of FSDP2 and of DeepSpeed's ZeRO 1 to 3 too.
    `per_device_train_batch_size` is of whole rows, and of the ranks that share them together.

    For a trainer made of transformers', this class before it: `class Trainer(leetdist.Trainer, trl.SFTTrainer): pass`.

    Args:
        args, kwargs: as transformers' own. The model is one that `parallelize` has seen, with a mesh that covers the
            job, or that an adapter of PEFT is around; of a model without a mesh, this is transformers' Trainer.

    What it computes: `compute_metrics` gets whole rows, (B, N, ...) logits and (B, N) labels, as in one process. Where
    rows do not divide among data-parallel ranks, accelerate fills the last batch up with the first rows.

    Raises:
        ValueError: the mesh does not cover the job; a setting whose loss cannot be told from a shard
            (`compute_loss_func`, `label_smoothing_factor`), that deals rows to all ranks (`batch_rebalance`,
            `dispatch_batches`), or that shards what is sharded (`parallelism_config` with cp, sp or tp).

    Source: a mean over all tokens of a step as in transformers' Trainer, `num_items_in_batch`; shards as in LASP, arXiv
    2404.02882.

    >>> import leetdist, tempfile, torch, transformers
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    >>> model = leetdist.parallelize(model, leetdist.device_mesh(sequence=1, device_type="cpu"))
    >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (4, 64))]
    >>> options = {"max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    >>> args = transformers.TrainingArguments(tempfile.mkdtemp(), **options)
    >>> _ = leetdist.Trainer(model, args, train_dataset=rows).train()
    {'train_runtime'...
    """

    _mesh: Any = None
    _loss: ModelLoss | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._look()

    # --- the model

    def _look(self) -> None:
        """Find the mesh and the loss of the model as it is now."""
        self._mesh = next((record.mesh for record in records_of(self.model).values()), None)
        losses = (getattr(x, "loss_function", None) for x in self.model.modules())
        self._loss = next((x for x in losses if isinstance(x, ModelLoss)), None)
        if self._mesh is not None:
            self._check()
            # parallelize unsets it for transformers' own Trainer, which would multiply the mean by the processes.
            self.model_accepts_loss_kwargs = self._loss is not None

    def _check(self) -> None:
        args, ranks = self.args, 1
        for transport in all_transports(self._mesh):
            ranks *= transport.size
        if ranks != self.accelerator.num_processes:
            raise ValueError(
                f"model is parallelized over a mesh of {ranks} ranks, and Trainer runs on "
                f"{self.accelerator.num_processes} processes: take a mesh of all, leetdist.device_mesh(sequence=...)"
            )
        if args.n_gpu > 1:
            raise ValueError(f"Trainer took {args.n_gpu} GPUs for one process: start a process for each, by torchrun")
        config = getattr(self.accelerator, "parallelism_config", None)
        for name in ("cp", "sp", "tp"):
            if (size := getattr(config, f"{name}_size", 1)) > 1:
                raise ValueError(f"parallelism_config has {name}_size {size}: leetdist shards the sequence itself")
        if self.accelerator.dispatch_batches:
            raise ValueError("dispatch_batches must not be set: rank 0 would deal rows to ranks that share a row")
        if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy 'batch_rebalance' deals rows to all ranks, also to those of a row"
            )
        if ranks > 1 and not args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices must be True: ranks of a row have different numbers of labels"
            )
        if sequence_group(self._mesh) is not None:
            for name, value in (
                ("compute_loss_func", self.compute_loss_func),
                ("label_smoothing_factor", self.label_smoother),
            ):
                if value is not None:
                    raise ValueError(f"{name}: shifts labels itself, which it cannot across the border of a shard")

    # --- batches: dealt by accelerate, to data-parallel ranks alone, and cut here

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = self._prepare_data_loader

    def _prepare_data_loader(self, loader: Any, *args: Any, **kwargs: Any) -> Any:
        accelerator = self.accelerator
        self._look()
        if self._mesh is None:
            return type(accelerator).prepare_data_loader(accelerator, loader, *args, **kwargs)
        rank, ranks = data_rank(self._mesh)
        prepared = prepare_data_loader(
            loader, accelerator.device, num_processes=ranks, process_index=rank, put_on_device=False,
            split_batches=accelerator.split_batches, rng_types=accelerator.rng_types.copy(), dispatch_batches=False,
            even_batches=accelerator.even_batches, use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )  # fmt: skip
        accelerator._dataloaders.append(prepared)
        return prepared

    def get_total_train_batch_size(self, args: Any) -> int:
        group = None if self._mesh is None else sequence_group(self._mesh)
        transport = resolve(group)
        return int(super().get_total_train_batch_size(args)) // (1 if transport is None else transport.size)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        shards = map(self._cut, islice(epoch_iterator, num_batches))
        return super().get_batch_samples(shards, num_batches, device)

    def _cut(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return batch if self._mesh is None else shard_batch(batch, self._mesh)

    # --- the loss: this rank's share of the mean over a step, which Trainer multiplies by the number of processes

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self._loss is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batch_samples or any("shift_labels" not in batch for batch in batch_samples):
            return None
        counted = torch.stack([(batch["shift_labels"] != IGNORED).sum() for batch in batch_samples]).sum()
        return all_sum(counted.to(device), all_transports(self._mesh))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        with self._loss.shares():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # --- evaluation: whole rows, and those of other data-parallel ranks

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        whole, inputs = inputs, self._cut(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        group = None if self._mesh is None else sequence_group(self._mesh)
        if (transport := resolve(group)) is None:
            return loss, logits, labels
        if loss is not None and self._loss is not None:
            loss = all_sum(loss, [transport]) / transport.size
        tokens = inputs["input_ids"].shape[1]

        def joined(x: Any) -> Any:
            per_token = isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == tokens
            return gather_sequence(x, 1, group) if per_token else x

        return loss, tree_map(joined, logits), None if labels is None else whole["labels"].to(self.args.device)

    @property
    def gather_function(self) -> Any:
        """What gathers rows from the ranks; transformers sets its own after each evaluation."""
        return self._theirs if self._mesh is None else self._gather

    @gather_function.setter
    def gather_function(self, function: Any) -> None:
        self._theirs = function

    def _gather(self, values: Any) -> Any:
        """Rows of all data-parallel ranks, without those that fill up the last batch."""
        state = self.accelerator.gradient_state
        rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
        dimensions = [x for name, x in dimensions_of(self._mesh).items() if name in DATA_NAMES and x.size() > 1]

        def gather(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x[None] if x.ndim == 0 else x
            return functools.reduce(lambda y, ranks: gather_sequence(y, 0, ranks), reversed(dimensions), x)[:rows]

        return tree_map(gather, values)


__all__ = ["Trainer"]
