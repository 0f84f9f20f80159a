"""trl's SFTTrainer with leetdist's Trainer before it: what it logs on one process, packed rows and adapters too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_transformers import llama

import leetdist
from helpers import run_ranks, values

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCABULARY, ROWS, STEPS = 61, 4, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "padding free": {"padding_free": True, "max_length": None},
    "LoRA": {},
}


class Sharded(leetdist.Trainer, trl.SFTTrainer):
    pass


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), pad_token="w0", eos_token="w2"
    )


def rows() -> Any:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (90 + 13 * (i % 4),), generator=generator).tolist() for i in range(16)]
    labels = [[-100] * (11 * (i % 7)) + row[11 * (i % 7) :] for i, row in enumerate(ids)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def everything(rank: int, ranks: int, folder: str) -> dict[str, list[dict[str, float]]]:
    torch.set_num_threads(1)
    found = {}
    for name, options in SETTINGS.items():
        args = trl.SFTConfig(
            folder, per_device_train_batch_size=ROWS, per_device_eval_batch_size=ROWS, max_steps=STEPS, optim="sgd",
            learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, data_seed=3,
            dataset_kwargs={"skip_prepare_dataset": True}, **options,
        )  # fmt: skip
        model = llama()
        if name == "LoRA":
            torch.manual_seed(3)
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            )
        kind = trl.SFTTrainer
        if ranks > 1:
            model, kind = leetdist.parallelize(model, leetdist.device_mesh(sequence=ranks)), Sharded
        data = rows()
        trainer = kind(
            model, args, train_dataset=data, eval_dataset=data.select(range(8)), processing_class=tokenizer()
        )
        trainer.train()
        trainer.evaluate()
        kept = ("loss", "grad_norm", "eval_loss", "mean_token_accuracy", "entropy", "num_tokens")
        found[name] = [{key: x for key, x in line.items() if key in kept} for line in trainer.state.log_history]
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    folder = str(tmp_path_factory.mktemp("run"))
    return {n: values(run_ranks(everything, n, n, folder, frameworks=True, timeout_s=200)) for n in (1, 2)}


@pytest.mark.parametrize("name", SETTINGS)
def test_logs_are_those_of_one_process(name: str, outcomes: dict[int, list[Any]]) -> None:
    (expected,) = outcomes[1]
    for found in outcomes[2]:
        assert sum("grad_norm" in line for line in found[name]) == STEPS
        assert sum("eval_loss" in line for line in found[name]) == 1
        assert found[name] == [pytest.approx(line, rel=5e-5) for line in expected[name]]
