"""PEFT's adapters on shards: around a parallelized model, within one, merged and taken off again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from test_transformers import llama, tiny
from torch import Tensor

import leetdist

RANKS = 2
BUILD = {"MiniMax": (tiny, ["qkv_proj", "q_proj", "v_proj"]), "Llama": (llama, ["q_proj", "v_proj", "down_proj"])}


def adapted(model: Any, targets: list[str]) -> Any:
    """The same random adapters on every rank, none of them zero, by a generator of their own: ranks are threads, and
    what another thread draws of the one they share would change them."""
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model, generator = peft.get_peft_model(model, config).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return model


def merged(model: Any) -> Any:
    return model.merge_and_unload().requires_grad_(True)


def inner(model: Any, mesh: Any) -> Any:
    """parallelize sees the model within, and not what is around it."""
    leetdist.parallelize(model.get_base_model(), mesh)
    return model


ORDERS: dict[str, Callable[[Any, list[str], Any], Any]] = {
    "after": lambda model, targets, mesh: leetdist.parallelize(adapted(model, targets), mesh),
    "before": lambda model, targets, mesh: adapted(leetdist.parallelize(model, mesh), targets),
    "the model within": lambda model, targets, mesh: inner(adapted(model, targets), mesh),
    "merged before": lambda model, targets, mesh: leetdist.parallelize(merged(adapted(model, targets)), mesh),
    "merged on shards": lambda model, targets, mesh: merged(leetdist.parallelize(adapted(model, targets), mesh)),
}


def batch_of() -> dict[str, Tensor]:
    ids = torch.randint(61, (2, 150), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 20:70] = -100
    return {"input_ids": ids, "labels": labels}


def learnt(model: Any) -> dict[str, Tensor]:
    """By the layers' names, whatever is around them."""
    grads = {name.rpartition("layers.")[2]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad for name, grad in grads.items() if "norm" not in name}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_in_any_order(order: str, name: str) -> None:
    build, targets = BUILD[name]
    batch, models = batch_of(), [build() for _ in range(RANKS)]
    whole = adapted(build(), targets)
    whole = merged(whole) if "merged" in order else whole
    expected = whole(**batch, use_cache=False)
    expected.loss.backward()
    without = build()(**batch).logits
    assert float((without - expected.logits).detach().abs().max()) > 0.1  # what is lost of an adapter shows
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = whole.generate(input_ids=batch["input_ids"], **options)

    def rank(group: Any) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        model = ORDERS[order](models[group.rank], targets, group)
        assert leetdist.parallelize(model, group) is model
        out = model(**leetdist.shard_batch(batch, group))
        (out.loss / RANKS).backward()
        logits = leetdist.gather_sequence(out.logits, 1, group).detach()
        grads = {key: grad.clone() for key, grad in learnt(model).items()}
        assert torch.equal(model.generate(input_ids=batch["input_ids"], **options), tokens)
        leetdist.unparallelize(model)
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected.logits, rtol=1e-5, atol=1e-5)
        return logits, out.loss.detach(), grads

    ranks = leetdist.virtual_ranks(rank, RANKS)
    reference = learnt(whole)
    assert reference
    assert all("lora" in key for key in reference) != ("merged" in order)
    for logits, loss, grads in ranks:
        torch.testing.assert_close(logits, expected.logits.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, expected.loss.detach())
        assert grads.keys() == reference.keys()
    for key, grad in reference.items():
        total = sum(grads[key] for _, _, grads in ranks)
        assert float((total - grad).abs().max() / grad.abs().max()) < 2e-5, key


def test_adapters_are_saved_and_loaded_without_a_trace(tmp_path: Any) -> None:
    """What a sharded model saves is what an unsharded one loads."""
    build, targets = BUILD["MiniMax"]
    batch = batch_of()
    model = leetdist.parallelize(adapted(build(), targets), None)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    with torch.no_grad():
        expected = adapted(build(), targets)(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora" in name).fill_(0)
        torch.testing.assert_close(copied(**batch).logits, expected, rtol=1e-5, atol=1e-5)


PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_learnt_prompts_are_refused_before_and_after(kind: str) -> None:
    batch, models = batch_of(), [llama() for _ in range(RANKS)]

    def rank(group: Any) -> None:
        prompted = peft.get_peft_model(models[group.rank], PROMPTS[kind]())
        with pytest.raises(ValueError, match="learnt prompts"):
            leetdist.parallelize(prompted, group)
        message = {"prompt": "position_ids must be given", "prefix": "labels: a call with a cache"}[kind]
        prompted = peft.get_peft_model(leetdist.parallelize(models[group.rank], group), PROMPTS[kind]())
        with pytest.raises(ValueError, match=message):
            prompted(**leetdist.shard_batch(batch, group))

    leetdist.virtual_ranks(rank, RANKS)
