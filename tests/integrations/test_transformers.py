"""transformers models on shards: what one process computes, rank by rank; and what is refused."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leetdist
from helpers import run_ranks, values

transformers = pytest.importorskip("transformers")
LightningAttention = pytest.importorskip("leetdist.integrations.transformers").LightningAttention

TOKENS = 150  # no multiple of anything: shards are uneven
LAYERS = ["linear_attention", "full_attention", "linear_attention"]


def tiny(**changes: Any) -> Any:
    """A MiniMax whose random weights are large enough for a lost state to show: at their usual size it hardly does."""
    options = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "layer_types": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "block_size": 16,
        "eos_token_id": None, "bos_token_id": None, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**options))
    return enlarged(model)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return enlarged(transformers.LlamaForCausalLM(config))


def enlarged(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.5)
    return model.eval()


def batch_of(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(61, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 20:70] = -100  # most of a shard does not count
    return {"input_ids": ids, "labels": labels}


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


def alone(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of transformers' own model, on the whole batch."""
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def sharded(rank: int, build: Any, ranks: int) -> dict[str, float]:
    """On one rank: the largest relative errors against transformers' own model in one process."""
    mesh = leetdist.device_mesh(sequence=ranks)
    batch = batch_of()
    logits, loss, grads = alone(build(), batch)
    errors = {}
    for checkpointing in (False, True):
        model = leetdist.parallelize(build(), mesh)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(**leetdist.shard_batch(batch, mesh))
        (out.loss / ranks).backward()  # summed below, where DDP would average
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
        name = " recomputed" if checkpointing else ""
        errors["logits" + name] = relative(leetdist.gather_sequence(out.logits, 1, mesh["sp"]), logits)
        errors["loss" + name] = relative(out.loss.detach(), loss)
        errors["gradients" + name] = max(relative(p.grad, grads[key]) for key, p in model.named_parameters())
    return errors


def under_fsdp2(rank: int, ranks: int) -> float:
    """The largest error of a gradient when every layer is wrapped by FSDP2 over the ranks of the sequence."""
    from torch.distributed.fsdp import fully_shard

    mesh = leetdist.device_mesh(sequence=ranks)
    batch = batch_of()
    _, _, grads = alone(tiny(), batch)
    model = leetdist.parallelize(tiny(), mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["sp"])
    fully_shard(model, mesh=mesh["sp"])
    model(**leetdist.shard_batch(batch, mesh)).loss.backward()
    return max(relative(p.grad.full_tensor(), grads[key]) for key, p in model.named_parameters())


def generated(rank: int, ranks: int) -> None:
    mesh = leetdist.device_mesh(sequence=ranks)
    ids = batch_of()["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    for prompt, mask in ((ids, None), (ids[:, :5], None), (ids, padded)):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = tiny().generate(prompt, **options)
        found = leetdist.parallelize(tiny(), mesh).generate(prompt, **options)
        assert torch.equal(found, expected), f"rank {rank}, prompt {tuple(prompt.shape)}: {found} != {expected}"
    with pytest.raises(ValueError, match="input_ids of a prompt must be the same on every rank, but rank 1's"):
        leetdist.parallelize(tiny(), mesh).generate((ids + (rank == 1)) % 61, max_new_tokens=2, pad_token_id=0)


def second_turn(rank: int, ranks: int) -> None:
    """A conversation goes on from the cache of its first turn, which no rank needs another for."""
    mesh = leetdist.device_mesh(sequence=ranks)
    ids, more = batch_of()["input_ids"].split([120, TOKENS - 120], 1)
    for build in (tiny, llama):
        name = "cache" if "cache" in inspect.signature(type(build()).forward).parameters else "past_key_values"
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
        model = leetdist.parallelize(build(), mesh)
        first = model.generate(ids, **options)
        text = torch.cat([first.sequences, more], 1)
        found = model.generate(text, **options, **{name: getattr(first, name)}).sequences
        expected = build().generate(text, **{**options, "use_cache": False}).sequences
        assert torch.equal(found, expected), f"{build.__name__}: {found} != {expected}"


def packed(rank: int, ranks: int) -> None:
    """Documents in one row equal each document alone: no state and no attention crosses their border, however told."""
    mesh = leetdist.device_mesh(sequence=ranks)
    ids = batch_of(1)["input_ids"]
    ends = [0, 41, 97, TOKENS]
    offsets = torch.tensor(ends)
    places = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])[None]
    for build in (tiny, llama):
        expected = torch.cat([build()(ids[:, a:b]).logits for a, b in pairwise(ends)], 1)
        models = [leetdist.parallelize(build(), mesh), leetdist.parallelize(build(), None)]
        for told in (
            {"cu_seqlens": offsets},
            {"position_ids": places},
            {"position_ids": places, "attention_mask": torch.ones_like(ids)},
            {
                "position_ids": places,
                "cu_seq_lens_q": offsets.int(),
                "cu_seq_lens_k": offsets.int(),
                "max_length_q": 56,
            },
        ):
            for model, where in zip(models, (mesh, None), strict=True):
                if where is None and build is llama and "attention_mask" in told:
                    continue  # transformers' own, which then takes the row for one document
                logits = model(**leetdist.shard_batch({"input_ids": ids, **told}, where), use_cache=False).logits
                logits = leetdist.gather_sequence(logits, 1, mesh["sp"]) if where is not None else logits
                assert relative(logits, expected) < 1e-5, f"{build.__name__}, {sorted(told)}, {where}"
        # Cut by someone else, who leaves it to the model to see it.
        local = {
            name: leetdist.shard_sequence(x, 1, mesh["sp"])
            for name, x in (("input_ids", ids), ("position_ids", places))
        }
        assert relative(leetdist.gather_sequence(models[0](**local).logits, 1, mesh["sp"]), expected) < 1e-5


def padding(rank: int, ranks: int) -> None:
    mesh = leetdist.device_mesh(sequence=ranks)
    batch = batch_of()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :60] = 0
    kept = batch["attention_mask"].bool()
    expected = tiny()(**batch).logits[kept]
    logits = leetdist.parallelize(tiny(), mesh)(**leetdist.shard_batch(batch, mesh)).logits
    assert relative(leetdist.gather_sequence(logits, 1, mesh["sp"])[kept], expected) < 1e-5


def wrong_calls(rank: int, ranks: int) -> None:
    mesh = leetdist.device_mesh(sequence=ranks)
    model = leetdist.parallelize(tiny(), mesh)
    local = leetdist.shard_batch(batch_of(), mesh)
    without = {name: x for name, x in local.items() if name != "position_ids"}
    with pytest.raises(ValueError, match="position_ids must be given"):
        model(**without)
    without = {name: x for name, x in local.items() if name != "shift_labels"}
    with pytest.raises(ValueError, match="shift_labels must be given"):
        model(**without)
    with pytest.raises(ValueError, match="output_router_logits"):
        model(**local, output_router_logits=True)
    with pytest.raises(ValueError, match="num_items_in_batch must be the labels that count over all ranks"):
        model(**local, num_items_in_batch=(local["labels"] != -100).sum() // 2)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**local, logits_to_keep=1)
    with pytest.raises(ValueError, match="token_type_ids is not known"):
        model(**local, token_type_ids=torch.zeros_like(local["input_ids"]))
    unlabelled = {name: x for name, x in local.items() if "label" not in name}
    with pytest.raises(ValueError, match="packed documents are several"):
        model(**unlabelled, cu_seqlens=torch.tensor([0, TOKENS]), use_cache=True)
    with pytest.raises(ValueError, match="labels: a call with a cache"):
        model(**local, use_cache=True)
    with pytest.raises(ValueError, match="packed documents lie in one row"):
        model(**{**local, "position_ids": local["position_ids"] % 40})
    with pytest.raises(ValueError, match=f"rank {rank} of {ranks} has no tokens"):
        model(input_ids=local["input_ids"][:, :0], position_ids=local["position_ids"][:, :0])


def lost_state(rank: int, ranks: int) -> float:
    """What the tolerance would have to miss: the layers' state restarting on every rank."""
    mesh = leetdist.device_mesh(sequence=ranks)
    batch = batch_of()
    expected = tiny()(**batch).logits.detach()
    model = leetdist.parallelize(tiny(), mesh)
    for layer in model.model.layers:
        if isinstance(layer.self_attn, LightningAttention):
            layer.self_attn.group = None
    logits = model(**leetdist.shard_batch(batch, mesh)).logits.detach()
    return relative(leetdist.gather_sequence(logits, 1, mesh["sp"]), expected)


def everything(rank: int, ranks: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"MiniMax": sharded(rank, tiny, ranks)}
    if ranks == 2:
        found["Llama"] = sharded(rank, llama, ranks)
        found["FSDP2"] = {"gradients": under_fsdp2(rank, ranks)}
    with torch.no_grad():
        generated(rank, ranks)
        second_turn(rank, ranks)
        packed(rank, ranks)
        padding(rank, ranks)
    wrong_calls(rank, ranks)
    found["lost state"] = lost_state(rank, ranks)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_equals_one_process(ranks: int) -> None:
    """Ranks share the heads of the softmax layers; four are more than its two key-value heads, and take one twice."""
    for found in values(run_ranks(everything, ranks, ranks, frameworks=True, timeout_s=120)):
        assert found.pop("lost state") > 0.1
        for model, errors in found.items():
            for what, error in errors.items():
                assert error < 1e-5, f"{model}: {what} {error:.1e}"


def test_drop_in_on_one_device() -> None:
    batch = batch_of()
    logits, loss, grads = alone(tiny(), batch)
    model = leetdist.parallelize(tiny(), None)
    ours = alone(model, batch)
    assert relative(ours[0], logits) < 1e-5
    assert relative(ours[1], loss) < 1e-5
    for name, grad in grads.items():
        assert relative(ours[2][name], grad) < 1e-5, name
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(batch["input_ids"], **options), tiny().generate(batch["input_ids"], **options))


def test_slopes_are_fp32_in_a_bf16_model() -> None:
    model = leetdist.parallelize(tiny().bfloat16(), None)
    layer = model.model.layers[0].self_attn
    expected = -tiny().model.layers[0].self_attn.slope_rate.flatten()
    torch.testing.assert_close(layer.log_decay(torch.device("cpu")), expected)


def test_a_layers_unknown_arguments_are_refused() -> None:
    model = leetdist.parallelize(tiny(), None)
    with pytest.raises(ValueError, match="lightning layer knows no window"):
        model.model.layers[0].self_attn(torch.randn(1, 4, 32), window=4)


def test_packed_rows_on_one_device() -> None:
    """Several rows too, each with documents of its own; transformers' own lightning layers carry their state on."""
    ids = batch_of()["input_ids"]
    ends = ([0, 41, TOKENS], [0, 90, 97, TOKENS])
    places = torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in ends])
    with torch.no_grad():
        alone = [
            torch.cat([tiny()(ids[i : i + 1, a:b]).logits for a, b in pairwise(row)], 1) for i, row in enumerate(ends)
        ]
        found = leetdist.parallelize(tiny(), None)(ids, position_ids=places, use_cache=False).logits
        theirs = tiny()(ids, position_ids=places, use_cache=False).logits
    assert relative(found, torch.cat(alone)) < 1e-5
    assert relative(theirs, torch.cat(alone)) > 1e-2


UNKNOWN = {
    "Mamba": lambda: transformers.MambaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=50),
    "Qwen3Next": lambda: transformers.Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, vocab_size=50),
    "Rwkv": lambda: transformers.RwkvConfig(num_hidden_layers=1, hidden_size=32, vocab_size=50),
    "Jamba": lambda: transformers.JambaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=50),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_models_with_unknown_states_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(UNKNOWN[name]())
    with pytest.raises(ValueError, match=f"does not know how to shard these layers of {name}"):
        leetdist.parallelize(model, None)


def test_static_caches_are_refused_on_ranks() -> None:
    """Their keys are as many as there may once be: taken for those of tokens, they gave other words."""
    ids = batch_of()["input_ids"][:, :40]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    models = [llama() for _ in range(2)]

    def rank(group: Any) -> None:
        model = leetdist.parallelize(models[group.rank], group)
        with pytest.raises(ValueError, match="StaticCache has a fixed length"):
            model.generate(ids, attention_mask=torch.ones_like(ids), disable_compile=True, **options)

    leetdist.virtual_ranks(rank, 2)


class HybridAttentionBlock(nn.Module):
    """Named like something unknown, but a stack of known layers; with an unknown one when asked."""

    def __init__(self, more: nn.Module) -> None:
        super().__init__()
        self.attention = leetdist.nn.LightningAttention(8, 2)
        self.more = more


def test_own_models_are_searched_as_well() -> None:
    leetdist.parallelize(HybridAttentionBlock(nn.Linear(8, 8)), None)
    for more in (nn.GRU(8, 8), nn.Conv1d(8, 8, 4), nn.MultiheadAttention(8, 2)):
        with pytest.raises(ValueError, match=rf"more \({type(more).__name__}\)"):
            leetdist.parallelize(HybridAttentionBlock(more), None)
    for kind in ("SelectiveScan", "S4D", "StateSpace", "LRU", "TokenShift", "CumulativeMean"):
        more = type(kind, (nn.Module,), {})()
        with pytest.raises(ValueError, match=rf"more \({kind}\)"):
            leetdist.parallelize(HybridAttentionBlock(more), None)
    leetdist.parallelize(HybridAttentionBlock(nn.GRU(8, 8)), None, allow=[nn.GRU])
    leetdist.parallelize(HybridAttentionBlock(nn.Conv1d(8, 8, 1)), None)
    with pytest.raises(ValueError, match="no layer that leetdist knows"):
        leetdist.parallelize(nn.Linear(8, 8), None)
