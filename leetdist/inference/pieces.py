"""Pieces of a stream: what checks look at of them, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from leetdist.engine.values import reads_values

Piece: TypeAlias = tuple[Tensor, ...]  # q, k, v and, of a decay a token, log_decay


def as_piece(given: Any) -> Piece:
    """Whatever was given for a piece, for checks that ranks wait for to say what is wrong with it."""
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def kind_of(piece: Piece) -> Hashable:
    """All that checks look at of a piece; None where they look at values, or something is odd."""
    if len(piece) not in (3, 4) or any(type(x) is not Tensor or x.is_nested for x in piece):
        return None
    if reads_log_decay(piece):
        return None
    return tuple((x.shape, x.dtype, x.device, x.layout) for x in piece)


def reads_log_decay(piece: Piece) -> bool:
    """Whether checks look at the log-decays of its tokens."""
    return len(piece) == 4 and isinstance(piece[3], Tensor) and reads_values(piece[3])


def lengths_if_alike(pieces: list[Piece]) -> list[int] | None:
    """Tokens of each piece, where nothing else of a piece, as far as checks look at it, is not as in the first; None
    where they have to look at each."""
    try:
        columns = list(zip(*pieces, strict=True))
    except (TypeError, ValueError):
        return None
    found: list[int] | None = None
    for column in columns:
        if set(map(type, column)) != {Tensor} or len(set(map(_FACTS, column))) > 1:
            return None
        shapes = list(map(_SHAPE, column))
        first = shapes[0]
        if len(first) < 3:
            return None
        if shapes.count(first) == len(shapes):
            lengths = [first[2]] * len(shapes)
        elif all((*shape[:2], *shape[3:]) == (*first[:2], *first[3:]) for shape in shapes):
            lengths = [shape[2] for shape in shapes]
        else:
            return None
        if found not in (None, lengths):
            return None
        found = lengths
    return found


_SHAPE = attrgetter("shape")
_FACTS = attrgetter("dtype", "device", "layout", "is_nested")


def token_major(x: Tensor) -> bool:
    """Whether x, (B, H, N, ...), is the view of a (B, N, H, ...) tensor."""
    return x.stride(1) < x.stride(2)


def copied(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, H, n, ...) behind each other."""
    if parts[0].ndim == 4 and token_major(parts[0]):
        return torch.cat(_dense([x.transpose(1, 2) for x in parts]), 1).transpose(1, 2)
    return torch.cat(_dense(list(parts)), 2)


def as_one(parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor | None:
    """Tensors (B, H, n, ...) of so many tokens that lie behind each other in memory, as slices of one do; else None."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tokens, strides = sum(lengths), list(map(Tensor.stride, parts))
    if strides.count(strides[0]) == len(strides) and not any(map(Tensor.is_neg, parts)):
        step, begin = first.stride(2) * first.element_size(), first.data_ptr()
        begins = [begin + step * place for place in accumulate(lengths[:-1], initial=0)]
        shape, memory = (*first.shape[:2], tokens, *first.shape[3:]), first.untyped_storage()
        extent = 1 + sum((size - 1) * by for size, by in zip(shape, first.stride(), strict=True))
        # All of it must be in the first one's memory: NumPy's slices come with no more of it than they have themselves.
        inside = begin + extent * first.element_size() <= memory.data_ptr() + memory.nbytes()
        if inside and list(map(Tensor.data_ptr, parts)) == begins:
            return first.as_strided(shape, first.stride(), first.storage_offset())
    return None


def _dense(parts: list[Tensor]) -> list[Tensor]:
    """The same, without slices at either end among dense tensors: one such slice, and all are copied number by number
    (43 us a piece of 1,000 tokens of 32 heads of 128 where it is 13)."""
    dense = list(map(Tensor.is_contiguous, parts))
    return [x.contiguous() for x in parts] if len(parts) - 2 <= sum(dense) < len(parts) else parts


__all__ = ["Piece", "as_one", "as_piece", "copied", "kind_of", "lengths_if_alike", "reads_log_decay", "token_major"]
