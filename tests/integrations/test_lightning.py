"""Lightning layers of remote code, taught by the names of their operators: on ranks, and on one device."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leetdist
from helpers import run_ranks, values

transformers = pytest.importorskip("transformers")

import remote_lightning as remote  # noqa: E402

from leetdist.integrations.lightning import register_lightning  # noqa: E402

STYLES = ("ling", "sala")
TOKENS, ENDS = 150, (0, 41, 97, 150)


def teach() -> None:
    register_lightning(remote.LingAttention, "lightning_attn_ops")
    register_lightning(remote.SalaAttention, "chunk_simple_gla", "fused_recurrent_simple_gla")


def tiny(style: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = remote.RemoteForCausalLM(remote.RemoteConfig(style=style, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)  # or a lost state hardly shows
    return model


def batch_of(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(61, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 20:70] = -100
    return {"input_ids": ids, "labels": labels}


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


def alone(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def generated(model: Any) -> Tensor:
    ids = batch_of(2)["input_ids"]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)


def everything(rank: int, ranks: int, expected: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(1)
    teach()
    mesh, errors = leetdist.device_mesh(sequence=ranks), {}
    for style in STYLES:
        batch, (logits, loss, grads, tokens, documents) = batch_of(2), expected[style]
        model = leetdist.parallelize(tiny(style), mesh)
        out = model(**leetdist.shard_batch(batch, mesh))
        (out.loss / ranks).backward()
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
        errors[f"{style} logits"] = relative(leetdist.gather_sequence(out.logits.detach(), 1, mesh["sp"]), logits)
        errors[f"{style} loss"] = relative(out.loss.detach(), loss)
        errors[f"{style} gradients"] = max(relative(p.grad, grads[name]) for name, p in model.named_parameters())
        with torch.no_grad():
            packed = {"input_ids": batch["input_ids"][:1], "cu_seqlens": torch.tensor(ENDS)}
            out = model(**leetdist.shard_batch(packed, mesh))
            errors[f"{style} packed"] = relative(leetdist.gather_sequence(out.logits, 1, mesh["sp"]), documents)
            assert torch.equal(generated(model), tokens)
    return errors


def reference(style: str) -> tuple[Any, ...]:
    """What the model's own code gives in one process, and each document alone."""
    logits, loss, grads = alone(tiny(style), batch_of(2))
    ids = batch_of(2)["input_ids"]
    with torch.no_grad():
        tokens = generated(tiny(style))
        documents = torch.cat([tiny(style)(ids[:1, a:b]).logits for a, b in pairwise(ENDS)], 1)
    return logits, loss, grads, tokens, documents


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {style: reference(style) for style in STYLES}


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_equals_one_process(ranks: int, expected: dict[str, Any]) -> None:
    for errors in values(run_ranks(everything, ranks, ranks, expected, frameworks=True, timeout_s=120)):
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("style", STYLES)
def test_drop_in_on_one_device(style: str, expected: dict[str, Any]) -> None:
    teach()
    logits, loss, grads, tokens, _ = expected[style]
    model = leetdist.parallelize(tiny(style), None)
    ours = alone(model, batch_of(2))
    assert relative(ours[0], logits) < 1e-5
    assert relative(ours[1], loss) < 1e-5
    assert max(relative(ours[2][name], grad) for name, grad in grads.items()) < 1e-5
    assert torch.equal(generated(model), tokens)
    decays = {layer: 8 * x for layer, x in leetdist.nn.decays_of(model).items()}
    leetdist.nn.check_decays(decays, "ling", layers=4)
    with pytest.raises(ValueError, match=r"packed documents: SoftmaxAttention .* apart on ranks alone"):
        model(batch_of(1)["input_ids"], cu_seqlens=torch.tensor(ENDS))


@pytest.mark.parametrize("style", STYLES)
def test_packed_rows_on_one_device(style: str) -> None:
    """Of lightning layers alone; several rows too."""
    teach()
    ids, places = batch_of(2)["input_ids"], torch.cat([torch.arange(b - a) for a, b in pairwise(ENDS)])[None]
    model = leetdist.parallelize(tiny(style, lightning=True), None)
    with torch.no_grad():
        documents = torch.cat([tiny(style, lightning=True)(ids[:, a:b]).logits for a, b in pairwise(ENDS)], 1)
        assert relative(model(ids, position_ids=places.expand(2, -1)).logits, documents) < 1e-5
        for told in ({"cu_seqlens": torch.tensor(ENDS)}, {"position_ids": places}):
            assert relative(model(ids[:1], **told).logits, documents[:1]) < 1e-5
        with pytest.raises(ValueError, match="packed documents are several"):
            model(ids[:1], position_ids=places, use_cache=True)


def test_layers_that_are_not_served_keep_their_operator(expected: dict[str, Any]) -> None:
    teach()
    with torch.no_grad():
        assert torch.equal(tiny("sala")(batch_of(2)["input_ids"]).logits, expected["sala"][0])


def test_decays_that_differ_by_token_are_taken_as_such() -> None:
    teach()
    layer = leetdist.parallelize(nn.Sequential(remote.LingAttention(remote.RemoteConfig(), 0)), None)[0]
    own = remote.LingAttention(remote.RemoteConfig(), 0)
    q, k, v = (torch.randn(2, 30, 4, 8) for _ in range(3))
    g, state = -torch.rand(2, 30, 4), torch.randn(2, 4, 8, 8)
    from leetdist.integrations.lightning import _layer

    with _layer(layer, None):
        ours = layer.lightning_attn_ops["chunk"](q, k, v, g, initial_state=state, output_final_state=True)
        step = layer.lightning_attn_ops["chunk"](*(x[:, :1] for x in (q, k, v, g)), None, 1.0, state, True)
        with pytest.raises(ValueError, match="knows no head_first"):
            layer.lightning_attn_ops["chunk"](q, k, v, g, head_first=True)
        with pytest.raises(ValueError, match="g and g_gamma are both given"):
            layer.lightning_attn_ops["chunk"](q, k, v, g, -torch.ones(4))
    theirs = own.lightning_attn_ops["chunk"](q, k, v, g, initial_state=state, output_final_state=True)
    one = own.lightning_attn_ops["chunk"](*(x[:, :1] for x in (q, k, v, g)), None, 1.0, state, True)
    for out, right in zip((*ours, *step), (*theirs, *one), strict=True):
        torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_names_no_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be a class of modules"):
        register_lightning(torch.ones, "ops")
    with pytest.raises(ValueError, match="operators must be one name or more"):
        register_lightning(Nothing)
    register_lightning(Nothing, "ops")
    with pytest.raises(ValueError, match="ops of Nothing is None"):
        leetdist.parallelize(nn.Sequential(Nothing()), None)
