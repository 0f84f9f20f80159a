"""What makes a layer exact: one tile for training, prefill and decoding."""

from __future__ import annotations

from typing import Any

from leetdist.arguments import as_bool, as_int


def check_exact(tile: Any, exact: Any) -> tuple[int | None, bool]:
    """A layer's `tile` and `exact`."""
    if tile is not None:
        tile = as_int("tile", tile, "a power of two of at least 16 tokens, or None")
        if tile < 16 or tile & (tile - 1):
            raise ValueError(f"tile must be a power of two of at least 16 tokens, or None, got {tile!r}")
    return tile, as_bool("exact", exact)


__all__ = ["check_exact"]
