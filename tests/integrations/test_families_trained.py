"""Every family by leetdist.Trainer, all of its weights and PEFT's adapters: what one process logs.

Two jobs, of 1 and 2 processes, go through all families; a test a family compares what they found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny
from torch import Tensor

import leetdist
from helpers import run_ranks, values

transformers = pytest.importorskip("transformers")

RANKS, ROWS, TOKENS, STEPS = 2, 4, 96, 1


def lora(model: Any) -> Any:
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(  # PEFT refuses the output projections of Mamba-2, whose kernels take their weights
        r=4, target_modules="all-linear", exclude_modules=["out_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


LEARNT: dict[str, Callable[[Any], Any]] = {"Trainer": lambda model: model, "LoRA": lora}


def rows() -> list[dict[str, Tensor]]:
    """Labels masked unevenly: over half of one shard, little of another."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(2 * ROWS * STEPS):
        ids = torch.randint(1, VOCABULARY, (TOKENS,), generator=generator)
        labels = ids.clone()
        labels[: 11 * (number % 7)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def everything(rank: int, ranks: int, folder: str) -> dict[str, list[dict[str, float]]]:
    torch.set_num_threads(1)
    mesh = leetdist.device_mesh(sequence=ranks) if ranks > 1 else None
    options = transformers.TrainingArguments(
        folder, per_device_train_batch_size=ROWS // 2, gradient_accumulation_steps=2, max_steps=STEPS,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=1, max_grad_norm=1.0,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, data_seed=3,
    )  # fmt: skip
    found = {}
    for name in FAMILIES:
        for how, learn in LEARNT.items():
            model, kind = learn(tiny(name)), transformers.Trainer  # one process has transformers' own of both
            if mesh is not None:
                model, kind = leetdist.parallelize(model, mesh), leetdist.Trainer
            trainer = kind(model, options, train_dataset=rows())
            trainer.train()
            lines = [line for line in trainer.state.log_history if "grad_norm" in line]
            found[f"{name}, {how}"] = [{key: line[key] for key in ("loss", "grad_norm")} for line in lines]
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    folder = str(tmp_path_factory.mktemp("run"))
    return {n: values(run_ranks(everything, n, n, folder, frameworks=True, timeout_s=200)) for n in (1, RANKS)}


@pytest.mark.parametrize("how", LEARNT)
@pytest.mark.parametrize("name", FAMILIES)
def test_logs_are_those_of_one_process(name: str, how: str, outcomes: dict[int, list[Any]]) -> None:
    (expected,) = outcomes[1]
    for found in outcomes[RANKS]:
        lines = found[f"{name}, {how}"]
        assert len(lines) == STEPS
        assert lines == [pytest.approx(line, rel=5e-5) for line in expected[f"{name}, {how}"]]
