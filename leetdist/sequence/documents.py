"""What a call says of the documents in its rows: checked, and what the host knows of it without reading a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from leetdist.arguments import check_plain, is_readable


def check_form(cu_seqlens: Tensor, like: Tensor | None = None) -> None:
    """Offsets of documents, but for their values, which there need be beside a `like` with values alone."""
    check_plain("cu_seqlens", cu_seqlens, "a tensor or None")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape (documents + 1,), got {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_meta and (like is None or not like.is_meta):
        raise ValueError("cu_seqlens must have values, got a tensor on the meta device")


def check_order(offsets: Sequence[int]) -> None:
    """Values of offsets, but for the last."""
    if offsets[0] != 0 or any(a > b for a, b in pairwise(offsets)):
        shown = ", ".join(map(str, offsets[:8])) + (", ..." if len(offsets) > 8 else "")
        raise ValueError(f"cu_seqlens must start at 0 and not decrease, got [{shown}]")


def check_offsets(cu_seqlens: Tensor, like: Tensor) -> None:
    """Both, as far as the host knows the values."""
    check_form(cu_seqlens, like)
    offsets = known_offsets(cu_seqlens)
    if isinstance(offsets, tuple):
        check_order(offsets)


def known_offsets(cu_seqlens: Tensor | None) -> tuple[int, ...] | int | None:
    """What the host knows of offsets, for the ranks to compare: all, or how many where reading them would stop a GPU's
    stream or break a graph."""
    if cu_seqlens is None:
        return None
    return tuple(cu_seqlens.tolist()) if is_readable(cu_seqlens) else len(cu_seqlens)


def check_end(cu_seqlens: Tensor | None, lengths: Sequence[int]) -> None:
    """Documents end where the sequence does, of which the ranks hold `lengths` tokens."""
    offsets = known_offsets(cu_seqlens)
    if isinstance(offsets, tuple) and offsets[-1] != sum(lengths):
        raise ValueError(f"cu_seqlens must end at the number of tokens on all ranks, {sum(lengths)}, got {offsets[-1]}")


def check_one_row(rows: int) -> None:
    """Packed documents lie behind each other in a single row."""
    if rows != 1:
        raise ValueError(f"cu_seqlens: packed documents lie in one row, so B must be 1, got {rows}")


def check_told_once(seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """By numbers of the tokens' documents or by offsets, not by both."""
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens both tell of documents: pass one of them")


__all__ = [
    "check_end",
    "check_form",
    "check_offsets",
    "check_one_row",
    "check_order",
    "check_told_once",
    "known_offsets",
]
