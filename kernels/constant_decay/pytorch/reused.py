"""Tensors that say where tokens are: short calls on the CPU take as long as it takes to make them, so there they are
kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch

from leetdist.kernels.runtime.memo import keeps

SHORT = 4096  # tokens


def reused(make: Callable[..., Iterator[Any]], tokens: int, device: torch.device, *args: Any) -> Iterable[Any]:
    """What `make(device, *args)` yields, to be read only. On a GPU it is made anew: a graph may be capturing it."""
    short = tokens <= SHORT and device.type == "cpu" and keeps()
    return _made(make, device, *args) if short else make(device, *args)


@lru_cache(maxsize=128)
def _made(make: Callable[..., Iterator[Any]], *args: Any) -> tuple[Any, ...]:
    with torch.inference_mode(False):  # used in calls that record gradients too
        return tuple(make(*args))
