"""What layers ask of their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leetdist.arguments import as_bool, as_int, as_tile


def check_exact(tile: Any, exact: Any) -> tuple[int | None, bool]:
    """A layer's `tile` and `exact`, which make it one for training, prefill and decoding."""
    return None if tile is None else as_tile(tile), as_bool("exact", exact)


def check_sizes(**sizes: Any) -> None:
    """Whole numbers of at least 1, by name; None is one that a layer chooses."""
    for name, size in sizes.items():
        if size is not None and as_int(name, size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_x(x: Tensor, dim: int) -> None:
    """A layer's input."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != dim:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must have shape (B, N, dim) = (B, N, {dim}), got {got}")


__all__ = ["check_exact", "check_sizes", "check_x"]
