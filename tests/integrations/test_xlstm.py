"""xLSTM beyond what test_families.py asks of every family: its stabiliser, caches and pieces, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import relative, tiny
from torch import Tensor

import leetdist

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def ids(tokens: int = 150) -> Tensor:
    return torch.randint(1, 61, (2, tokens), generator=torch.Generator().manual_seed(1))


def with_gates(low: float, high: float, **options: Any) -> Any:
    """A model whose input gates are as small or large as their soft cap lets them be."""
    model = tiny("xLSTM", **options)
    for name, p in model.named_parameters():
        if name.endswith("igate_preact.bias"):
            p.copy_(torch.linspace(low, high, len(p)))
    return model


@pytest.mark.parametrize("gates", [(-40.0, 40.0), (10.0, 40.0)])
def test_gates_of_any_size_are_the_models(gates: tuple[float, float]) -> None:
    """exp(i) from 3e-7 to 3e6, where eps exp(m) is no longer small: by the model's own recurrence, token by token."""
    theirs, ours = with_gates(*gates), leetdist.parallelize(with_gates(*gates), None)
    theirs.config.chunk_size = 1 << 20  # so that no chunk fits
    for block in theirs.backbone.blocks:
        block.mlstm_layer.mlstm_backend.__init__(theirs.config)
    assert relative(ours(ids()).logits, theirs(ids()).logits) < 5e-6


def test_caches_are_theirs_in_fp32() -> None:
    """What ours keeps, theirs goes on with, and the other way round; several tokens at once too."""
    theirs, ours = tiny("xLSTM"), leetdist.parallelize(tiny("xLSTM"), None)
    whole = theirs(ids(), use_cache=False).logits
    for first, second in ((theirs, ours), (ours, theirs), (ours, ours)):
        begun = first(ids()[:, :100], use_cache=True)
        name = "cache" if hasattr(begun, "cache") else "cache_params"
        cache = begun[name]
        more = second(ids()[:, 100:149], use_cache=True, **{name: cache})
        last = second(ids()[:, 149:], use_cache=True, **{name: cache})
        logits = torch.cat([begun.logits, more.logits, last.logits], 1)
        assert relative(logits, whole) < 1e-5
        assert int(cache.seqlen_offset) == 150
    kept = leetdist.parallelize(tiny("xLSTM").bfloat16(), None)(ids(), use_cache=True)
    state = (kept["cache"] if hasattr(kept, "cache") else kept["cache_params"]).rnn_state[0]
    assert {x.dtype for x in state} == {torch.float32}


def test_long_prompts_are_not_cut_into_pieces() -> None:
    """transformers' own takes them in pieces whose states it rounds to bf16 where no cache is given."""
    whole = tiny("xLSTM")(ids(), use_cache=False).logits
    pieces = {"max_inference_chunksize": 64}
    ours = leetdist.parallelize(tiny("xLSTM", **pieces), None)
    assert relative(ours(ids(), use_cache=False).logits, whole) < 1e-5
    assert relative(tiny("xLSTM", **pieces)(ids(), use_cache=False).logits, whole) > 1e-4
    assert ours.config.max_inference_chunksize == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes(dtype: torch.dtype) -> None:
    """As near to fp32 as transformers' own, whose gates and sums of decays have the model's dtype."""
    right = with_gates(-3.0, 12.0)(ids()).logits
    ours = leetdist.parallelize(with_gates(-3.0, 12.0).to(dtype), None)(ids()).logits
    theirs = with_gates(-3.0, 12.0).to(dtype)(ids()).logits
    assert relative(ours, right) < 1.2 * relative(theirs, right)


def test_fused_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with them cannot be given initial weights by transformers, but loaded ones."""
    monkeypatch.setattr(transformers.xLSTMPreTrainedModel, "_init_weights", lambda *_: None)
    theirs = tiny("xLSTM", weight_mode="fused")
    ours = leetdist.parallelize(tiny("xLSTM", weight_mode="fused"), None)
    assert relative(ours(ids()).logits, theirs(ids()).logits) < 1e-5


def test_gates_without_a_cap_are_refused() -> None:
    with pytest.raises(ValueError, match="gate_soft_cap must be positive and at most 40"):
        leetdist.parallelize(tiny("xLSTM", gate_soft_cap=80.0), None)
