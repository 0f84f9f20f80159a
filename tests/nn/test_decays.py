"""The decays that a model computes with, and whether they are those of the ladder that it should have."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from leetdist.nn import LADDERS, LightningAttention, SimpleGLA, check_decays, decays_of, log_decay

LAYERS = 6


class Remote(nn.Module):
    """A layer of somebody else's, that holds its slopes as models do."""

    def __init__(self, slopes: torch.Tensor, layer: int, name: str = "slope_rate") -> None:
        super().__init__()
        self.register_buffer(name, slopes)
        self.layer_idx = layer


def remote(ladder: str, name: str = "slope_rate", heads: int = 12, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = (1, 2, 4, 5)  # the others are softmax layers
    held = [-log_decay(ladder, heads, layer, LAYERS)[:, None, None].to(dtype) for layer in layers]
    model = nn.ModuleList(Remote(slopes, layer, name) for slopes, layer in zip(held, layers, strict=True))
    model.config = SimpleNamespace(num_hidden_layers=LAYERS)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ladder", sorted(LADDERS))
def test_each_ladder_is_told_from_the_others(ladder: str, dtype: torch.dtype) -> None:
    model = remote(ladder, dtype=dtype)
    check_decays(model, ladder)
    same = {"ling", "ling-mlx"}  # they differ in layer 0 alone, which this model has none of
    for other in set(LADDERS) - {ladder} - (same if ladder in same else set()):
        with pytest.raises(ValueError, match=rf"layer \d has other decays than the ladder '{other}'") as error:
            check_decays(model, other)
        assert f"'{ladder}'" in str(error.value).split("; ")[1]


def test_what_fits_none_says_so() -> None:
    model = remote("tnl")
    model[2].slope_rate *= 1.001
    with pytest.raises(ValueError, match=r"layer 4 has other decays .* no ladder of leetdist.nn.LADDERS fits"):
        check_decays(model, "tnl")


@pytest.mark.parametrize("name", ["slope", "slopes", "g_gamma"])
@pytest.mark.parametrize("sign", [1, -1])
def test_decays_are_found_by_any_name_and_sign(name: str, sign: int) -> None:
    model = remote("ling", name)
    for layer in model:
        setattr(layer, name, sign * getattr(layer, name))
    check_decays(model, "ling")


def test_own_layers_are_counted() -> None:
    own = nn.Sequential(*(LightningAttention(32, 4, decay="ling", layer=i, layers=3) for i in range(3)))
    own.append(SimpleGLA(32, 4))  # whose decays are the tokens'
    assert list(decays_of(own)) == [0, 1, 2]
    check_decays(own, "ling", layers=3)
    with pytest.raises(ValueError, match=r"layer 0 .* those of 'ling' fit all layers"):
        check_decays(own, "ling-mlx", layers=3)


def test_what_cannot_be_checked_is_refused() -> None:
    odd: Any = 3
    for call in (decays_of, partial(check_decays, name="tnl", layers=1)):
        with pytest.raises(ValueError, match=r"model must be a module.* got int"):
            call(odd)
    with pytest.raises(ValueError, match="layers must be the number of layers of the model"):
        check_decays({0: torch.ones(4)}, "tnl")
    with pytest.raises(ValueError, match=re.escape("model must have layers with constant decays, got a Linear")):
        check_decays(nn.Linear(2, 2), "tnl", layers=1)
    with pytest.raises(ValueError, match="decay must be one of"):
        check_decays({0: torch.ones(4)}, "rwkv", layers=1)
    twice = nn.ModuleList([Remote(torch.ones(4), 1), Remote(torch.ones(4), 1)])
    with pytest.raises(ValueError, match="two layers of number 1"):
        decays_of(twice)
    with pytest.raises(ValueError, match="layer 7 of 4"):
        check_decays({7: torch.ones(4)}, "tnl", layers=4)
