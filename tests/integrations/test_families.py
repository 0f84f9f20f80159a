"""The families of families.py, on gloo ranks and alone: what one process computes by transformers' own code."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, relative, tiny
from torch import Tensor

import leetdist
from helpers import run_ranks, values

transformers = pytest.importorskip("transformers")

TOKENS = 150  # no multiple of anything: shards are uneven
ENDS = (0, 41, 97, TOKENS)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))

# Before transformers 5.23 the layers of these are not told what a call says of documents, or of padding.
DEAF = {"Mamba2", "NemotronH", "FalconH1", "FalconH1 normed"} if VERSION < (5, 23) else set()
DEAF_TO_PADDING = {"FalconH1", "FalconH1 normed"} if VERSION < (5, 23) else set()


def batch_of(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 20:70] = -100  # most of a shard does not count
    return {"input_ids": ids, "labels": labels}


def own(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of one process on the whole batch."""
    model.zero_grad()
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a gradient, each measured by its own largest number."""
    assert {name for name, x in found.items() if x is not None} == {n for n, x in expected.items() if x is not None}
    return max(relative(found[name], grad) for name, grad in expected.items() if grad is not None and grad.any())


def trained(model: Any, mesh: Any, name: str, *, rows: int = 2, replicas: int = 1) -> dict[str, float]:
    """Errors of a step of a parallelized model; each replica has some of the rows."""
    batch = batch_of(rows)
    logits, loss, grads = own(tiny(name), batch)
    mine = mesh["dp"].get_local_rank() if replicas > 1 else 0
    part = {key: x.chunk(replicas)[mine] for key, x in batch.items()}
    model.zero_grad()
    out = model(**leetdist.shard_batch(part, mesh))
    (out.loss / mesh.size()).backward()  # summed below, where DDP would average
    for p in model.parameters():
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)
    whole = leetdist.gather_sequence(out.logits, 1, mesh["sp"])
    return {
        "logits": relative(whole, logits.chunk(replicas)[mine]),
        "loss": relative(out.loss.detach(), loss),
        "gradients": worst({key: p.grad for key, p in model.named_parameters()}, grads),
    }


def told(row: Tensor) -> list[dict[str, Tensor]]:
    """The same documents in every way that a batch may tell of them."""
    places = torch.cat([torch.arange(b - a) for a, b in pairwise(ENDS)])[None]
    numbers = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(ENDS))])[None]
    ways: list[dict[str, Tensor]] = [{"cu_seqlens": torch.tensor(ENDS)}, {"position_ids": places}, {"seq_idx": numbers}]
    return [{"input_ids": row, **way} for way in ways]


def packed(model: Any, mesh: Any, name: str) -> None:
    """Documents in one row give what each gives alone by transformers' own code, in every layer, however told."""
    row = batch_of(1)["input_ids"]
    theirs = tiny(name)
    expected = torch.cat([theirs(row[:, a:b], use_cache=False).logits for a, b in pairwise(ENDS)], 1)
    for batch in told(row):
        local = batch if mesh is None else leetdist.shard_batch(batch, mesh)
        if name in DEAF:
            with pytest.raises(ValueError, match="does not hand what a call says of packed documents on"):
                model(**local)
            continue
        logits = model(**local).logits
        logits = logits if mesh is None else leetdist.gather_sequence(logits, 1, mesh["sp"])
        assert relative(logits, expected) < 1e-5, f"{name}: {sorted(batch)}"


def generated(model: Any, name: str) -> None:
    """Greedy tokens after a prompt with padding, also inside, and after too few tokens to share. Theirs without
    a cache, because transformers' own steps do not keep dt within its limits, as its prefill does."""
    ids = batch_of()["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    inside = padded.clone()
    inside[0, 60:80] = 0
    theirs = tiny(name)
    for prompt, mask in ((ids, padded), (ids, inside), (ids[:, :2], torch.ones_like(ids[:, :2]))):
        if name in DEAF_TO_PADDING and not mask.all() and model._leetdist_mesh is not None:
            with pytest.raises(ValueError, match="does not hand what a call says of padding on"):
                model.generate(prompt, attention_mask=mask, **GREEDY)
            mask = torch.ones_like(ids)
        expected = theirs.generate(prompt, attention_mask=mask, use_cache=False, **GREEDY)
        found = model.generate(prompt, attention_mask=mask, **GREEDY)
        assert torch.equal(found, expected), f"{name}, prompt {tuple(prompt.shape)}: {found} != {expected}"


def on_two(rank: int) -> dict[str, Any]:
    """Every family on this rank: its errors."""
    torch.set_num_threads(1)
    mesh = leetdist.device_mesh(sequence=2)
    found = {}
    for name in FAMILIES:
        model = leetdist.parallelize(tiny(name), mesh)
        found[name] = trained(model, mesh, name)
        with torch.no_grad():
            packed(model, mesh, name)
            generated(model, name)
        if name in ("NemotronH", "Zamba2"):
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            found[f"{name}, recomputed"] = trained(model, mesh, name)
    return found


def on_four(rank: int) -> dict[str, Any]:
    """A sequence of each family on four ranks, and of some on two, whose other two have other rows."""
    torch.set_num_threads(1)
    whole, halves = leetdist.device_mesh(sequence=4), leetdist.device_mesh(sequence=2)
    found = {}
    for name in (name for name in FAMILIES if " " not in name):
        found[name] = trained(leetdist.parallelize(tiny(name), whole), whole, name)
    for name in ("FalconH1", "NemotronH"):
        model = leetdist.parallelize(tiny(name), halves)
        found[f"{name}, dp x sp"] = trained(model, halves, name, rows=4, replicas=2)
    return found


@pytest.mark.parametrize(("work", "ranks"), [(on_two, 2), (on_four, 4)])
def test_on_ranks(work: Any, ranks: int) -> None:
    for found in values(run_ranks(work, ranks, frameworks=True, timeout_s=200)):
        errors = {f"{family}: {what}": error for family, of in found.items() for what, error in of.items()}
        assert max(errors.values()) < 1e-5, {name: error for name, error in errors.items() if not error < 1e-5}


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_in(name: str) -> None:
    model = leetdist.parallelize(tiny(name), None)
    logits, loss, grads = own(tiny(name), batch_of())
    ours = own(model, batch_of())
    assert relative(ours[0], logits) < 1e-5
    assert relative(ours[1], loss) < 1e-5
    assert worst(ours[2], grads) < 1e-5
    with torch.no_grad():
        packed(model, None, name)
        generated(model, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_states_reach_far(name: str) -> None:
    """What the tolerances would have to miss: another beginning changes tokens that lie far behind it."""
    ids = batch_of()["input_ids"]
    other = ids.clone()
    other[:, :30] = (other[:, :30] + 7) % VOCABULARY
    model = tiny(name)
    with torch.no_grad():
        one, two = (model(x, use_cache=False).logits[:, -20:] for x in (ids, other))
    assert relative(two, one) > 0.05


@pytest.mark.parametrize("name", ["Mamba2", "FalconH1"])
def test_bf16_models(name: str) -> None:
    """Decays, dt and D x are fp32 in them too: no farther from the model in fp32 than transformers' own code."""
    ids = batch_of()["input_ids"]
    with torch.no_grad():
        rounded = tiny(name).bfloat16()
        exact = tiny(name)
        exact.load_state_dict({key: x.float() for key, x in rounded.state_dict().items()})
        expected = exact(ids, use_cache=False).logits
        theirs = relative(rounded(ids, use_cache=False).logits.float(), expected)
        ours = relative(leetdist.parallelize(rounded, None)(ids, use_cache=False).logits.float(), expected)
    assert ours < 1.5 * theirs
    assert ours < 0.05


DEEP: dict[str, dict[str, Any]] = {
    "Mamba2": {"num_hidden_layers": 7},
    "NemotronH": {"layers_block_type": [*["mamba", "mlp"] * 2, "attention", *["mamba", "mlp"] * 2]},
    "Zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
}


@pytest.mark.parametrize("name", DEEP)
def test_as_many_layers_as_models_have(name: str) -> None:
    """More than the few that are tried, of those alike."""
    ids = batch_of()["input_ids"][:, :40]
    with torch.no_grad():
        expected, found = (
            model(ids, use_cache=False).logits
            for model in (tiny(name, **DEEP[name]), leetdist.parallelize(tiny(name, **DEEP[name]), None))
        )
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("name", ["Bamba", "Mamba2"])
def test_static_caches(name: str) -> None:
    """Of a fixed length: right alone and where no softmax layer reads keys, else refused on ranks."""
    ids = batch_of()["input_ids"][:, :40]
    mask = torch.ones_like(ids)
    options = {**GREEDY, "attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    expected = tiny(name).generate(ids, **{**GREEDY, "attention_mask": mask}, use_cache=False)
    assert torch.equal(leetdist.parallelize(tiny(name), None).generate(ids, **options), expected)

    def rank(group: Any) -> Tensor:
        found: Tensor = leetdist.parallelize(tiny(name), group).generate(ids, **options)
        return found

    if name == "Bamba":
        with pytest.raises(ValueError, match=r"StaticCache has a fixed length|attention_mask must be"):
            leetdist.virtual_ranks(rank, 2)
    else:
        assert all(torch.equal(x, expected) for x in leetdist.virtual_ranks(rank, 2))


def test_the_documents_table_has_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    table = page.split("### Families with recurrent layers")[1].split("###")[0]
    rows = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")} - {"family"}
    assert {name.split()[0] for name in FAMILIES} <= rows
