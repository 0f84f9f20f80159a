"""The decay ladders of published models, under one name each: one natural-log decay a head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Ladder: TypeAlias = Callable[[int, int, int], list[float]]

LADDERS: dict[str, Ladder] = {}
"""Name -> function of (heads, layer, layers) that returns one log decay a head; add your own with `ladder`."""


def ladder(name: str) -> Callable[[Ladder], Ladder]:
    """Decorator that adds a ladder to the registry."""

    def register(function: Ladder) -> Ladder:
        LADDERS[name] = function
        return function

    return register


def log_decay(name: str, heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """(heads,) fp32 on the CPU: the natural log of the decay a token, <= 0, of `layer` out of `layers`.

    Args:
        name: "none", "alibi", "tnl", "minimax", "retnet", "fla-lightning", or one added with `ladder`.
        heads: number of heads.
        layer: index of the layer, from 0; TNL, MiniMax and fla make deeper layers forget more slowly.
        layers: number of layers of the model.

    Raises:
        ValueError: the name is unknown, or a number is out of range.

    Source: the ladder's own docstring.

    >>> log_decay("retnet", 3).exp()
    tensor([0.9688, 0.9844, 0.9922])
    """
    if name not in LADDERS:
        raise ValueError(f"decay must be one of {sorted(LADDERS)}, got {name!r}")
    if heads < 1 or not 0 <= layer < layers:
        raise ValueError(f"heads must be >= 1 and 0 <= layer < layers, got heads {heads}, layer {layer} of {layers}")
    # The device is named, because models are also built under `torch.device("meta")`.
    return torch.tensor(LADDERS[name](heads, layer, layers), dtype=torch.float32, device="cpu")


@ladder("none")
def _none(heads: int, layer: int, layers: int) -> list[float]:
    """No decay: plain causal linear attention, Katharopoulos et al., arXiv 2006.16236."""
    return [0.0] * heads


@ladder("alibi")
def _alibi(heads: int, layer: int, layers: int) -> list[float]:
    """Press et al., arXiv 2108.12409: 2^(-8 i / H); a head count that is no power of two takes the largest power below
    it, then every other slope of twice that."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return [-slope for slope in slopes]


@ladder("tnl")
def _tnl(heads: int, layer: int, layers: int) -> list[float]:
    """TransNormerLLM, arXiv 2307.14995, eq. 9, and MiniMax-Text-01's own code: ALiBi's, less in deeper layers."""
    share = 1 - layer / max(layers - 1, 1) + 1e-5
    return [share * slope for slope in _alibi(heads, layer, layers)]


@ladder("minimax")
def _minimax(heads: int, layer: int, layers: int) -> list[float]:
    """MiniMax-01, arXiv 2501.08313, as transformers' MiniMaxLightningAttention has it (for any head count)."""
    share = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return [-share * 2 ** (-8 * i / heads) for i in range(1, heads + 1)]


@ladder("retnet")
def _retnet(heads: int, layer: int, layers: int) -> list[float]:
    """RetNet, arXiv 2307.08621, section 3.1: gamma = 1 - 2^(-5 - i), the same in all layers."""
    return [math.log1p(-(2.0 ** (-5 - i))) for i in range(heads)]


@ladder("fla-lightning")
def _fla(heads: int, layer: int, layers: int) -> list[float]:
    """flash-linear-attention's lightning attention: linear in the head, 0 for the first one."""
    return [-8 / heads * (1 - layer / layers) * i for i in range(heads)]


__all__ = ["LADDERS", "ladder", "log_decay"]
