"""The contestants of benchmarks/leetdecoding.py: leetdist's methods, and LeetDecoding's own kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import leetdist
from leetdist.engine.checks import METHODS

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours() -> dict[str, Attention]:
    call = leetdist.linear_attention
    return {f"leetdist {method}": partial(_named, call, method) for method in METHODS}


def _named(call: Any, method: str, *tensors: Tensor) -> Tensor:
    return call(*tensors, method=method)


def _factor(log_decay: Tensor) -> Tensor:
    return torch.exp(log_decay)


def _slope(log_decay: Tensor) -> Tensor:
    return -log_decay


# Module, function, and the form in which it takes the decay; the slowest last.
THEIRS = {
    "LeetDecoding causal_dot_product": ("causal_dot_product", "causal_dot_product", _factor),
    "LeetDecoding lightningAttention2": ("lightningAttention2", "lightning_attn2", _slope),
    "LeetDecoding block-based": ("BlockBased", "blockBased", _slope),
    "LeetDecoding recursion": ("Recursion", "recursion", _slope),
    "LeetDecoding vanilla": ("linear_attn", "linear_attn", _slope),
    "LeetDecoding FleetAttention": ("FleetAttention_triton", "FleetAttention_triton", _factor),
}


def theirs(folder: str | None, only: list[str]) -> dict[str, Attention]:
    """LeetDecoding's kernels that can be imported here, each given the decay in the form it takes."""
    if folder is None:
        return {}
    sys.path.insert(0, folder)
    # Their Lightning kernel looks the GPU's name up in a table of four at import, through pycuda; it is told A100.
    driver = type(sys)("pycuda.driver")
    driver.Device = lambda index: type("Device", (), {"name": lambda self: "NVIDIA A100 80GB PCIe"})()
    package = type(sys)("pycuda")
    package.driver, package.autoinit = driver, None
    sys.modules.update({"pycuda": package, "pycuda.driver": driver, "pycuda.autoinit": package})
    found: dict[str, Attention] = {}
    for name, (module, function, form) in THEIRS.items():
        if not any(part in name for part in only):
            continue  # some of them are compiled when they are imported
        try:
            loaded = __import__(f"leetDecoding.methods.{module}", fromlist=[function])
            found[name] = partial(_in_their_form, getattr(loaded, function), form)
        except Exception as error:
            print(f"{name} cannot be loaded: {type(error).__name__}: {error}")
    return found


def _in_their_form(call: Any, form: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return call(q, k, v, form(log_decay).to(q.dtype))
