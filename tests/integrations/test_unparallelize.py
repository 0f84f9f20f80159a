"""parallelize twice, for another mesh, in part, and undone: right, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_parallelize import Block, llama
from torch import Tensor, nn

import leetdist


def minimax() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_local_experts": 2,
    }
    config = transformers.MiniMaxConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.MiniMaxForCausalLM(config).eval()


def own() -> nn.Module:
    layers = [leetdist.nn.LightningAttention(8, 2), leetdist.nn.Mamba2(8, head_dim=4, state=4), Block(nn.Identity())]
    return nn.Sequential(nn.Embedding(61, 8), *layers).eval()


BUILD = {"MiniMax": minimax, "Llama": llama, "own": own}


def logits_of(model: Any, batch: dict[str, Tensor], group: Any = None) -> Tensor:
    batch = leetdist.shard_batch(batch, group)
    with torch.no_grad():
        out = model(batch["input_ids"]) if isinstance(model, nn.Sequential) else model(**batch, use_cache=False).logits
        return out if group is None else leetdist.gather_sequence(out, 1, group)


def shape_of(model: nn.Module) -> list[Any]:
    """All that `parallelize` might put into a model: classes, attributes, hooks, and the attention that is chosen."""
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    tables = [[x for x in vars(m).values() if isinstance(x, dict)] for m in model.modules()]
    inside = [
        (type(m), sorted(vars(m)), [list(x) for x in held]) for m, held in zip(model.modules(), tables, strict=True)
    ]
    return [chosen, getattr(model, "loss_function", None), getattr(model, "accepts_loss_kwargs", None), inside]


@pytest.mark.parametrize("name", BUILD)
def test_parallelizing_twice_for_another_mesh_and_not_at_all(name: str) -> None:
    ids = torch.arange(96)[None] * 7 % 61
    batch = {"input_ids": ids, "labels": ids}
    models = [BUILD[name]() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    expected, _ = (logits_of(model, batch) for model in models)  # both are run: they remember decays by device
    shape = shape_of(models[0])

    def rank(group: Any) -> None:
        model = models[group.rank]
        assert leetdist.parallelize(model, group) is model
        assert shape_of(model) != shape
        again = shape_of(model)
        assert leetdist.parallelize(model, group) is model
        assert shape_of(model) == again
        torch.testing.assert_close(logits_of(model, batch, group), expected)
        with pytest.raises(ValueError, match=r"parallelized already, for another mesh: call leetdist\.unparallelize"):
            leetdist.parallelize(model, None)
        torch.testing.assert_close(logits_of(model, batch, group), expected)
        assert leetdist.unparallelize(model) is model
        assert shape_of(model) == shape
        assert torch.equal(logits_of(model, batch), expected)
        with pytest.raises(ValueError, match="is not parallelized"):
            leetdist.unparallelize(model)
        leetdist.parallelize(model, None)
        torch.testing.assert_close(logits_of(model, batch), expected)
        torch.testing.assert_close(
            logits_of(leetdist.parallelize(leetdist.unparallelize(model), group), batch, group), expected
        )

    leetdist.virtual_ranks(rank, 2)


def test_what_is_parallelized_in_part_is_refused() -> None:
    inner = leetdist.parallelize(Block(nn.Identity()), None)
    with pytest.raises(ValueError, match="only in part"):
        leetdist.parallelize(nn.Sequential(inner, leetdist.nn.LightningAttention(8, 2)), None)
    with pytest.raises(ValueError, match="only in part"):
        leetdist.parallelize(nn.ModuleList([inner, llama()]), None)
    inner.more = leetdist.nn.Mamba2(8, head_dim=4, state=4)
    with pytest.raises(ValueError, match="only in part"):
        leetdist.parallelize(inner, None)
    leetdist.parallelize(leetdist.unparallelize(nn.Sequential(inner)), None)


def test_what_is_wrapped_is_not_undone() -> None:
    mesh = leetdist.device_mesh(sequence=1, device_type="cpu")
    model = torch.distributed.fsdp.fully_shard(leetdist.parallelize(Block(nn.Identity()), mesh), mesh=mesh["sp"])
    with pytest.raises(ValueError, match="unparallelize cannot take off DDP"):
        leetdist.unparallelize(model)
    with pytest.raises(ValueError, match="model must be a module"):
        leetdist.unparallelize(3)  # type: ignore[type-var]
