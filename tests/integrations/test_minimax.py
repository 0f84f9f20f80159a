"""MiniMax on one device: the decays that its model computes with, and what is told of packed documents."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import leetdist

transformers = pytest.importorskip("transformers")

from test_transformers import LAYERS, TOKENS, LightningAttention, batch_of, relative, tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def of_eight_layers() -> Any:
    """A model of three layers with the decays of the first three of eight: as its checkpoint has them."""
    model, deeper = tiny(), tiny(num_hidden_layers=8, layer_types=[*LAYERS, *LAYERS, *LAYERS[:2]])
    buffers = {name: x for name, x in deeper.state_dict().items() if name in dict(model.named_buffers())}
    model.load_state_dict(buffers, strict=False)
    return model


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_decays_are_those_of_the_checkpoint(loaded: str, tmp_path: Any) -> None:
    """transformers computes with the buffers that a checkpoint brings, whatever the configuration says."""
    theirs, options = of_eight_layers(), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = leetdist.parallelize(of_eight_layers() if loaded == "before" else tiny(), None)
    if loaded == "after":
        ours(batch_of()["input_ids"])  # and not those of a call before
        ours.load_state_dict(theirs.state_dict())
    ids = batch_of()["input_ids"]
    assert relative(ours(ids).logits, theirs(ids).logits) < 1e-5
    assert relative(tiny()(ids).logits, theirs(ids).logits) > 0.1
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    ours.save_pretrained(tmp_path)
    again = leetdist.parallelize(transformers.MiniMaxForCausalLM.from_pretrained(tmp_path), None)
    assert relative(again(ids).logits, theirs(ids).logits) < 1e-5
    leetdist.nn.check_decays(ours, "minimax", layers=8)
    with pytest.raises(ValueError, match="layer 2 has other decays than the ladder 'minimax'"):
        leetdist.nn.check_decays(ours, "minimax")


def test_decays_of_a_bf16_checkpoint_keep_what_is_stored() -> None:
    layer = leetdist.parallelize(of_eight_layers().bfloat16(), None).model.layers[2].self_attn
    assert torch.equal(layer.log_decay(torch.device("cpu")), -layer.slope_rate.float().flatten())
    rounded = tiny().bfloat16().float()  # now its own decays, for transformers too
    layer = leetdist.parallelize(rounded, None).model.layers[2].self_attn
    assert torch.equal(layer.log_decay(torch.device("cpu")), -layer.slope_rate.flatten())
    assert not torch.equal(layer.slope_rate, layer.get_slope_rate())


def test_two_kinds_of_decays_in_a_layer_are_refused() -> None:
    model = tiny()
    model.model.layers[0].self_attn.slope_rate *= 8
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn decodes with the slopes of its buffer slope_rate"):
        leetdist.parallelize(model, None)
    assert not any(isinstance(x, LightningAttention) for x in model.modules())


def test_options_that_transformers_keeps_and_does_not_use_are_named(recwarn: Any) -> None:
    same = {"attn_type_list": [0, 1, 0], "rotary_dim": 8, "head_dim": 8, "layernorm_mlp_beta": 1}
    leetdist.parallelize(tiny(**same), None)
    assert not [w for w in recwarn if "MiniMax-Text-01" in str(w.message)]
    own = {"attn_type_list": [0, 0, 0], "rotary_dim": 4, "layernorm_mlp_alpha": 3.5}
    with pytest.warns(
        UserWarning, match=r"attn_type_list.*rotary_dim 4, .*layernorm_mlp_alpha 3.5, where mlp_alpha"
    ) as seen:
        leetdist.parallelize(tiny(head_dim=8, **own), None)
    assert seen[-1].filename == __file__


@pytest.mark.parametrize("told", [("cu_seqlens",), ("position_ids",), ("cu_seq_lens_q", "cu_seq_lens_k")])
def test_packed_rows_by_any_name_need_no_cache(told: tuple[str, ...]) -> None:
    """By default a model keeps a cache; a row of several documents has none, by whichever names they are told."""
    ids, ends = batch_of(1)["input_ids"], [0, 41, 97, TOKENS]
    how: dict[str, Any] = dict.fromkeys(told, torch.tensor(ends, dtype=torch.int32))
    if "position_ids" in told:
        how["position_ids"] = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])[None]
    elif "cu_seqlens" not in told:
        how |= {"max_length_q": 56, "max_length_k": 56}
    model = leetdist.parallelize(tiny(), None)
    with torch.no_grad():
        alone = torch.cat([tiny()(ids[:, a:b]).logits for a, b in pairwise(ends)], 1)
        out = model(ids, **how)
    assert relative(out.logits, alone) < 1e-5
    with pytest.raises(ValueError, match="packed documents are several"):
        model(ids, **how, use_cache=True)


def test_offsets_that_disagree_are_refused() -> None:
    model, ids = leetdist.parallelize(tiny(), None), batch_of(1)["input_ids"]
    with pytest.raises(ValueError, match="cu_seq_lens_k and cu_seq_lens_q tell of other documents"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 41, TOKENS]), cu_seq_lens_k=torch.tensor([0, 42, TOKENS]))
