"""transformers' Trainer over shards, against transformers' own on one process: what it logs, evaluates and saves.

Three jobs, of 1, 2 and 4 processes, go through all settings; a test a setting compares what they found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from test_transformers import llama, tiny
from torch import Tensor

import leetdist
from helpers import run_ranks, values

transformers = pytest.importorskip("transformers")
deepspeed = pytest.importorskip("deepspeed")

VOCABULARY, ROWS, STEPS = 61, 4, 2
MESHES = {"sp 2": (2, 2), "dp 2 x sp 2": (4, 2)}  # ranks, ranks a sequence


def rows_of(*, lengths: bool) -> list[dict[str, Tensor]]:
    """Rows whose labels are masked unevenly: over half of one shard, little of another."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(ROWS * STEPS * 2):
        ids = torch.randint(VOCABULARY, (96 + 17 * (number % 5) * lengths,), generator=generator)
        labels = ids.clone()
        labels[: 11 * (number % 7)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of rows of different lengths."""
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    pad = torch.nn.utils.rnn.pad_sequence
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {name: pad([row[name] for row in rows], True, fill) for name, fill in fills.items()}


@dataclass
class Setting:
    """What differs between the runs; `rows` are those of a step and a data-parallel rank that one process has."""

    build: Callable[[], Any] = tiny
    options: dict[str, Any] = field(default_factory=dict)
    lengths: bool = False
    collate: Callable[..., Any] | None = None
    data_parallel: bool = False  # whether it runs on data-parallel ranks too, which take longer
    sharded: dict[str, Any] = field(default_factory=dict)  # options where there are ranks: who shards the weights


def recomputing() -> Any:
    model = tiny()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def zero(stage: int, **more: Any) -> dict[str, Any]:
    told = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(told, "auto"),
    }
    return {"deepspeed": {**config, "zero_optimization": {"stage": stage, **more}}}


CLIPPED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
SETTINGS = {
    "plain": Setting(options={"max_grad_norm": 0.5}, data_parallel=True),
    "gradient accumulation": Setting(options={"gradient_accumulation_steps": 2}, data_parallel=True),
    "recomputed": Setting(recomputing),
    # Data-parallel ranks would get other rows than one process: transformers shuffles groups of per-device batches.
    "group by length": Setting(options={"train_sampling_strategy": "group_by_length"}, lengths=True, collate=padded),
    "padded": Setting(lengths=True, collate=padded, data_parallel=True),
    "flattened": Setting(llama, lengths=True, collate=transformers.DataCollatorWithFlattening(), data_parallel=True),
    "workers": Setting(llama, {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}),
    "ZeRO-1": Setting(options=CLIPPED, sharded=zero(1)),
    "ZeRO-2": Setting(options=CLIPPED, sharded=zero(2)),
    # Without the threshold a model as small as this is not cut at all.
    "ZeRO-3": Setting(options=CLIPPED, sharded=zero(3, stage3_param_persistence_threshold=0), data_parallel=True
    ),
    "FSDP2": Setting(options=CLIPPED, sharded={"fsdp": True}, data_parallel=True),
}  # fmt: skip


def arguments(folder: str, data: int, **more: Any) -> Any:
    options = {"save_strategy": "no", "max_grad_norm": 0.0, "max_steps": STEPS, **more}
    return transformers.TrainingArguments(
        folder, per_device_train_batch_size=ROWS // data, per_device_eval_batch_size=ROWS // data, learning_rate=0.1,
        optim="sgd", optim_args="momentum=0.9", lr_scheduler_type="constant", logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, data_seed=3, include_num_input_tokens_seen="non_padding", **options,
    )  # fmt: skip


def trainer_of(setting: Setting, sequence: int, folder: str, **more: Any) -> Any:
    """transformers' own on one process, ours on more."""
    data, options = torch.distributed.get_world_size() // sequence, {**setting.options, **more}
    if sequence > 1:
        options |= setting.sharded
    args = arguments(folder, data, **options)  # first, as ZeRO-3 wants it
    model, kind = setting.build(), transformers.Trainer
    if sequence > 1:
        model, kind = leetdist.parallelize(model, leetdist.device_mesh(sequence=sequence)), leetdist.Trainer
    rows: Any = rows_of(lengths=setting.lengths)
    return kind(
        model, args, train_dataset=rows, eval_dataset=rows[: 2 * ROWS], data_collator=setting.collate,
        compute_metrics=metrics,
    )  # fmt: skip


def metrics(predictions: Any) -> dict[str, float]:
    """Of whole rows, in their order: the labels that were not masked, and which of them the logits got right."""
    logits, labels = map(torch.as_tensor, (predictions.predictions, predictions.label_ids))
    counted = labels[:, 1:] != -100
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & counted
    places = torch.arange(right.numel()).view_as(right) % 1009
    return {"right": int(right.sum()), "counted": int(counted.sum()), "where": int((places * right).sum())}


def logged(trainer: Any) -> list[dict[str, float]]:
    kept = ("loss", "grad_norm", "eval_loss", "eval_right", "eval_counted", "eval_where", "num_input_tokens_seen")
    return [{name: x for name, x in line.items() if name in kept} for line in trainer.state.log_history]


def resumed(sequence: int, folder: str) -> list[dict[str, float]]:
    """Two steps, their checkpoint, and two more by another trainer, whose model begins anew."""
    first = trainer_of(SETTINGS["plain"], sequence, folder, save_strategy="steps", save_steps=STEPS)
    first.train()
    second = trainer_of(SETTINGS["plain"], sequence, folder, max_steps=2 * STEPS)
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS}")
    return logged(second)


def straight(sequence: int, folder: str) -> list[dict[str, float]]:
    trainer = trainer_of(SETTINGS["plain"], sequence, folder, max_steps=2 * STEPS)
    trainer.train()
    return logged(trainer)


WRAPPED = {"FSDP2": "FSDP", **{f"ZeRO-{stage}": "DeepSpeedEngine" for stage in (1, 2, 3)}}


def believe_in_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """On a CPU accelerate takes DDP instead of FSDP, and says nothing."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    patch.setattr(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_GPU))
    patch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))


REFUSED: dict[str, dict[str, Any]] = {
    "label_smoothing_factor: shifts labels itself": {"label_smoothing_factor": 0.1},
    "dispatch_batches must not be set": {"accelerator_config": {"dispatch_batches": True}},
    "train_sampling_strategy 'batch_rebalance' deals rows": {"train_sampling_strategy": "batch_rebalance"},
    "average_tokens_across_devices must be True": {"average_tokens_across_devices": False},
}


def refusals(sequence: int, folder: str) -> None:
    for message, options in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            trainer_of(SETTINGS["plain"], sequence, folder, **options)
    model = leetdist.parallelize(tiny(), leetdist.device_mesh(sequence=sequence))
    with pytest.raises(ValueError, match="compute_loss_func: shifts labels itself"):
        leetdist.Trainer(model, arguments(folder, 1), compute_loss_func=lambda *_, **__: None)
    alone = torch.distributed.new_subgroups(1)[0]
    with pytest.raises(ValueError, match="over a mesh of 1 ranks, and Trainer runs on 2 processes"):
        leetdist.Trainer(leetdist.parallelize(tiny(), alone), arguments(folder, 1))


def everything(rank: int, sequence: int, folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles a kernel for two minutes
    ranks = torch.distributed.get_world_size()
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        if ranks > sequence and not setting.data_parallel:
            continue
        with mock.patch.dict(os.environ), pytest.MonkeyPatch.context() as patch:  # accelerate leaves words there
            if "fsdp" in setting.sharded and sequence > 1:
                believe_in_a_gpu(patch)
            trainer = trainer_of(setting, sequence, folder)
            trainer.train()
        if sequence > 1:
            assert type(trainer.model_wrapped).__name__.startswith(WRAPPED.get(name, "DistributedDataParallel"))
        if name == "plain":
            trainer.evaluate()
        assert trainer.get_total_train_batch_size(trainer.args) == ROWS * trainer.args.gradient_accumulation_steps
        found[name] = logged(trainer)
    found["resumed"] = (straight if ranks == 1 else resumed)(sequence, folder)
    if ranks == 2:
        refusals(sequence, folder)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    jobs = {"one process": (1, 1), **MESHES}
    return {
        name: values(run_ranks(everything, ranks, sequence, str(tmp_path_factory.mktemp("run")), frameworks=True))
        for name, (ranks, sequence) in jobs.items()
    }


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("setting", [*SETTINGS, "resumed"])
def test_logs_and_evaluations_are_those_of_one_process(setting: str, mesh: str, outcomes: Any) -> None:
    (expected,) = outcomes["one process"]
    for rank, found in enumerate(outcomes[mesh]):
        if setting not in found:
            assert mesh == "dp 2 x sp 2"
            assert not SETTINGS[setting].data_parallel
            continue
        lines = found[setting]
        assert sum("grad_norm" in line for line in lines) == (2 * STEPS if setting == "resumed" else STEPS)
        assert sum("eval_loss" in line for line in lines) == (setting == "plain")
        assert lines == [pytest.approx(line, rel=2e-5) for line in expected[setting]], f"rank {rank}"
