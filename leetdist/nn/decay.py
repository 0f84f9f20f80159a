"""The decay ladders of published models, under one name each: one natural-log decay a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from leetdist.arguments import as_int, as_str, check_plain

Ladder: TypeAlias = Callable[[int, int, int], list[float]]

LADDERS: dict[str, Ladder] = {}
"""Name -> function of (heads, layer, layers) that returns one log decay a head; add your own with `ladder`."""


def ladder(name: str) -> Callable[[Ladder], Ladder]:
    """Decorator that adds a ladder to the registry: `log_decay`, and the layers' `decay`, take its name then.

    The function gets (heads, layer, layers), whole numbers, layer from 0, and returns one log decay a head, <= 0.

    >>> import leetdist, math
    >>> @leetdist.nn.ladder("half")
    ... def half(heads, layer, layers):
    ...     return [math.log(0.5)] * heads
    >>> leetdist.nn.log_decay("half", 2).exp()
    tensor([0.5000, 0.5000])
    >>> del leetdist.nn.LADDERS["half"]
    """

    as_str("name", name)

    def register(function: Ladder) -> Ladder:
        if not callable(function):
            raise ValueError(f"function must be callable, got {type(function).__name__}")
        LADDERS[name] = function
        return function

    return register


def log_decay(name: str, heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """(heads,) fp32 on the CPU: the natural log of the decay a token, <= 0, of `layer` out of `layers`.

    Args:
        name: "none", "alibi", "tnl", "ling", "ling-mlx", "minimax", "retnet", "fla-lightning", or one added with
            `ladder`.
        heads: number of heads.
        layer: index of the layer, from 0 for every ladder; TNL, Ling, MiniMax and fla make deeper layers forget more
            slowly.
        layers: number of layers of the model.

    Raises:
        ValueError: the name is unknown, or a number is out of range.

    Source: the ladder's own docstring.

    >>> log_decay("retnet", 3).exp()
    tensor([0.9688, 0.9844, 0.9922])
    """
    if not isinstance(name, str) or name not in LADDERS:
        raise ValueError(f"decay must be one of {sorted(LADDERS)}, got {name!r}")
    heads, layer, layers = as_int("heads", heads), as_int("layer", layer), as_int("layers", layers)
    if heads < 1 or not 0 <= layer < layers:
        raise ValueError(f"heads must be >= 1 and 0 <= layer < layers, got heads {heads}, layer {layer} of {layers}")
    # The device is named, because models are also built under `torch.device("meta")`.
    return torch.tensor(LADDERS[name](heads, layer, layers), dtype=torch.float32, device="cpu")


# What models call their decays, or minus their logarithms.
_NAMES = ("slope_rate", "slope", "slopes", "g_gamma")


def decays_of(model: nn.Module) -> dict[int, Tensor]:
    """Layer -> (heads,) log decays that a model computes with, of each of its layers that has constant ones.

    Those are leetdist's own layers, what `leetdist.parallelize` made of others, and layers that hold a tensor called
    slope, slopes, slope_rate or g_gamma, of either sign. A layer's number is its `layer_idx`, or else its place among
    them, from 0. Decays keep their dtype.

    Raises:
        ValueError: no layer has decays, or two have the same number.

    Source: the names are those of MiniMax-01's, Ling's and flash-linear-attention's code.

    >>> import leetdist
    >>> leetdist.nn.decays_of(leetdist.nn.Retention(32, heads=2))
    {0: tensor([-0.0317, -0.0157])}
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {type(model).__name__}")
    found: dict[int, Tensor] = {}
    for module in model.modules():
        own: Any = getattr(module, "log_decay", None)
        if callable(own) and not getattr(module, "by_token", False):
            decays = own(torch.device("cpu")).detach()
        else:
            held = (getattr(module, name, None) for name in _NAMES)
            decays = next((-x.detach().abs().flatten() for x in held if isinstance(x, Tensor)), None)
        if decays is None:
            continue
        layer = getattr(module, "layer_idx", None)
        layer = len(found) if layer is None else int(layer)
        if layer in found:
            raise ValueError(f"model has two layers of number {layer} with decays: pass a mapping from layer to decays")
        found[layer] = decays
    if not found:
        raise ValueError(f"model must have layers with constant decays, got a {type(model).__name__} with none")
    return found


def check_decays(model: nn.Module | Mapping[int, Tensor], name: str, *, layers: int | None = None) -> None:
    """See that a model computes with the decays of the ladder that it is said to have.

    A decay is part of a trained model like a weight; but runtimes make it from the configuration, each by a formula of
    its own, and none tells when it is another one than in training.

    Args:
        model: a module, of which `decays_of` finds the decays, or a mapping from a layer's number, from 0, to its
            (heads,) log decays or slopes, of any sign and floating dtype.
        name: a ladder, as `log_decay` takes it.
        layers: number of layers of the model, those without decays too; None is `model.config.num_hidden_layers`.

    Raises:
        ValueError: a layer has other decays, by more than its dtype's rounding. The message says where, by how much,
            and which ladders fit; or `layers` is not known, or not given.

    Source: the ladders' own docstrings.

    >>> import leetdist
    >>> decays = {layer: leetdist.nn.log_decay("ling", 4, layer, 8) for layer in range(8)}
    >>> leetdist.nn.check_decays(decays, "ling", layers=8)
    >>> leetdist.nn.check_decays(decays, "tnl", layers=8)
    Traceback (most recent call last):
    ...
    ValueError: layer 0 has other decays than the ladder 'tnl': head 0 has -0.285717, ... those of 'ling' fit all layers
    """
    if not isinstance(model, nn.Module | Mapping):
        raise ValueError(f"model must be a module, or decays by layer, got {type(model).__name__}")
    if layers is None:
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(f"layers must be the number of layers of the model, which has no configuration, got {layers}")
    decays = decays_of(model) if isinstance(model, nn.Module) else _as_decays(model)
    differs = _differs(decays, name, layers)
    if differs is None:
        return
    fitting = [repr(other) for other in LADDERS if _differs(decays, other, layers) is None]
    layer, head, wanted = differs
    raise ValueError(
        f"layer {layer} has other decays than the ladder {name!r}: head {head} has {float(decays[layer][head]):.6g}, "
        f"where the ladder has {wanted:.6g}; "
        + (f"those of {' and '.join(fitting)} fit all layers" if fitting else "no ladder of leetdist.nn.LADDERS fits")
    )


def _as_decays(told: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Of slopes or log decays by layer."""
    if not told:
        raise ValueError("model must have decays of at least one layer, got none")
    for layer, x in told.items():
        check_plain(f"model[{layer!r}]", x, "a layer's decays, a tensor")
    return {layer: -x.abs().flatten() for layer, x in told.items()}


def _differs(decays: Mapping[int, Tensor], name: str, layers: int) -> tuple[int, int, float] | None:
    """(layer, head, the ladder's decay) where decays differ most in the first layer where they do."""
    for layer, found in sorted(decays.items()):
        wanted = log_decay(name, len(found), layer, layers).double()
        rounding = torch.finfo(found.dtype).eps / 2 + 1e-5
        excess = (found.double().cpu() - wanted).abs() - rounding * wanted.abs()
        if bool((excess > 0).any()):
            head = int(excess.argmax())
            return layer, head, float(wanted[head])
    return None


@ladder("none")
def _none(heads: int, layer: int, layers: int) -> list[float]:
    """No decay: plain causal linear attention, Katharopoulos et al., arXiv 2006.16236."""
    return [0.0] * heads


@ladder("alibi")
def _alibi(heads: int, layer: int, layers: int) -> list[float]:
    """Press et al., arXiv 2108.12409: 2^(-8 i / H); a head count that is no power of two takes the largest power below
    it, then every other slope of twice that. MiniCPM-SALA's lightning layers have these, in all layers."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return [-slope for slope in slopes]


@ladder("tnl")
def _tnl(heads: int, layer: int, layers: int) -> list[float]:
    """TransNormerLLM, arXiv 2307.14995, eq. 9, and MiniMax-Text-01's own code: ALiBi's, less in deeper layers, counted
    from 0. SGLang and vLLM take it for Ling and Ring too."""
    return _deeper(heads, layer, layers)


@ladder("ling")
def _ling(heads: int, layer: int, layers: int) -> list[float]:
    """Ling and Ring-linear 2.0, 2.5 and 2.6, arXiv 2510.19338, as the releases' own code has it: tnl's of one layer
    before, so that the first layer forgets faster than ALiBi's."""
    return _deeper(heads, layer - 1, layers)


@ladder("ling-mlx")
def _ling_mlx(heads: int, layer: int, layers: int) -> list[float]:
    """Ling and Ring-linear as mlx-lm runs them: ling's, but the first layer has what the second has."""
    return _deeper(heads, max(layer - 1, 0), layers)


def _deeper(heads: int, layer: int, layers: int) -> list[float]:
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


__all__ = ["LADDERS", "check_decays", "decays_of", "ladder", "log_decay"]
