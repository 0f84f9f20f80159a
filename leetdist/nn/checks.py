"""What layers ask of their arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from leetdist.arguments import as_bool, as_float, as_int, as_tile, is_memory
from leetdist.sequence.agreement import told
from leetdist.sequence.group import resolve

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

LARGEST = (1 << 31) - 1  # of what a layer has; what PyTorch says of more names no argument


def check_exact(tile: Any, exact: Any) -> tuple[int | None, bool]:
    """A layer's `tile` and `exact`, which make it one for training, prefill and decoding."""
    return None if tile is None else as_tile(tile), as_bool("exact", exact)


def as_size(name: str, value: Any) -> int:
    """How many or how wide, at least 1, as a Python int."""
    size: int = as_int(name, value)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    if size > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:,}, got {size:,}")
    return size


def share_of(name: str, width: int, heads: int) -> int:
    """A head's part of a width."""
    if width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}: {name} is {width}")
    return width // heads


def as_eps(value: Any) -> float:
    """What a norm adds to a mean of squares."""
    eps: float = as_float("eps", value)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    return eps


def check_x(x: Tensor, dim: int, group: Group | None) -> None:
    """The input of a layer with this group."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != dim:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        refuse(f"x must have shape (B, N, dim) = (B, N, {dim}), got {got}", x, group)


def as_return_state(value: Any, x: Any, group: Group | None) -> bool:
    """A layer's `return_state`, when it is called with x."""
    try:
        return as_bool("return_state", value)
    except ValueError as error:
        refuse(str(error), x, group)


def refuse(words: str, x: Any, group: Group | None) -> NoReturn:
    """A ValueError in a layer called with x, of which the group's other ranks, that wait in the layer, are told."""
    numberless = isinstance(x, Tensor) and (x.is_meta or not is_memory(x))  # a call that this rank makes by itself
    with told(None if numberless else resolve(group), "the arguments of a layer"):
        raise ValueError(words)


__all__ = ["as_eps", "as_return_state", "as_size", "check_exact", "check_x", "refuse", "share_of"]
