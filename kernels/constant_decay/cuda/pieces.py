"""Pieces of a row that lie apart, read where they are: of each of q, k and v one map of the copy engine, which has all
of its pieces in it, and a table that says where in it each chunk is (pieces.cu)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from typing import TypeAlias

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.tensor_map import TensorMap, map_of, tensor_map

CHUNK = 64  # tokens
MOST = 232  # pieces, whose places are arguments of a launch: of 4,096 bytes
KEPT = 2048  # bytes that a block has for the table's rows of its tile
FARTHEST = 2**31 - CHUNK  # coordinate of a map
UNIT = 512  # bytes that a map counts in, where allocators begin; or a part of them


@dataclass(frozen=True, eq=False)
class InPieces:
    """q, k or v (batch, heads, tokens, dim) in pieces, of which `map` is the map. chunks: (batch, chunks, 4) int32, of
    each chunk its token in a piece, and where on the map's first axis the pieces of q, k and v are. held: memory that
    they are in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    map: TensorMap
    chunks: Tensor
    held: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Behind:
    """q, k or v (batch, heads, tokens, dim) in two tensors: the first chunk, of which `before` tokens are another's,
    and those behind them."""

    first: Tensor
    rest: Tensor
    before: int

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.rest.shape[:2], CHUNK + self.rest.shape[2], self.rest.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.rest.dtype

    @property
    def device(self) -> torch.device:
        return self.rest.device

    @property
    def map(self) -> TensorMap:
        return _map(self.rest)


Operand: TypeAlias = Tensor | InPieces | Behind


def fetched(*operands: Operand) -> tuple[int, tuple[int | TensorMap, ...]]:
    """How operands such as these are fetched (-DPIECES of hopper_tile.cuh), and what a kernel is told of it."""
    if isinstance(operands[0], InPieces):
        return 1, (operands[0].chunks.data_ptr(),)
    behind = [x for x in operands if isinstance(x, Behind)]
    return (2, (behind[0].before, *(_map(x.first) for x in behind))) if behind else (0, ())


def _map(x: Tensor) -> TensorMap:
    found = map_of(x)
    assert found is not None
    return found


def in_place(columns: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> tuple[InPieces, ...] | None:
    """q, k and v of pieces of so many tokens, of which nothing but the chunks that lie in several is copied; None where
    the copy engine does not know such pieces."""
    slots = max(lengths, default=0) // CHUNK
    if not slots or len(lengths) > MOST:
        return None
    laid = [_Operand.of(column, slots * CHUNK) for column in columns]
    operands = [x for x in laid if x is not None]
    if len(operands) < len(laid):
        return None
    first, tokens = columns[0][0], sum(lengths)
    batch = first.shape[0]
    chunks = torch.empty(batch, ceil_div(tokens, CHUNK), 4, dtype=torch.int32, device=first.device)
    begins = list(accumulate(lengths, initial=0))
    given = struct.pack(
        f"={MOST + 2 + 3 * MOST}i", *begins, *[0] * (MOST + 2 - len(begins)),
        *chain.from_iterable((*x.at, *[0] * (MOST - len(lengths))) for x in operands),
    )  # fmt: skip
    launch = _kernel(first.device)
    launch(
        (len(lengths) + 1, batch * sum(column[0].shape[1] for column in columns)), 256,
        given, len(lengths), tokens, slots, chunks.data_ptr(), *chain.from_iterable(x.arguments for x in operands),
    )  # fmt: skip
    return tuple(
        InPieces((*x.shape[:2], tokens, x.shape[3]), x.dtype, first.device, x.map, chunks, x.held) for x in operands
    )


@dataclass(frozen=True, eq=False)
class _Operand:
    """One of q, k and v: where its pieces are, in the map's units, and what else the kernel is told of it."""

    at: list[int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    map: TensorMap
    held: tuple[Tensor, ...]
    arguments: tuple[int, ...]

    @classmethod
    def of(cls, pieces: Sequence[Tensor], room: int) -> _Operand | None:
        """room: tokens that one tensor of the pieces' strides holds of chunks in several."""
        first = max(pieces, key=lambda x: x.shape[2])
        shape, number = first.shape, first.element_size()
        (*steps, one) = first.stride()
        if first.is_neg() or one != 1 or shape[3] % 8:
            return None
        # A stream's last piece is short, and few others: they are laid as the longest one is.
        others = [x.is_neg() or x.stride() != first.stride() for x in pieces]
        if sum(others) > 1 + len(pieces) // 16:
            return None
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, first.stride(), strict=True))
        if extent > 2 * first.numel():  # slices of longer tensors: chunks beside them would take as much memory
            return None
        apart = ceil_div(number * extent, UNIT) * UNIT
        beside = first.new_empty(ceil_div(len(pieces) * CHUNK, room) * apart // number)
        pieces = [_laid_as(first, x) if other else x for x, other in zip(pieces, others, strict=True)]
        addresses = list(map(Tensor.data_ptr, pieces))
        base = min(*addresses, beside.data_ptr())
        reach = max(*addresses, beside.data_ptr() + beside.nbytes) - base + (shape[0] - 1) * steps[0] * number
        every = UNIT | apart | (steps[0] * number if shape[0] > 1 else 0) | (beside.data_ptr() - base)
        for address in addresses:
            every |= address - base
        unit = every & -every
        if unit % 16 or reach // unit > FARTHEST:
            return None
        everywhere = torch.Size((FARTHEST, *shape[1:]))
        found = tensor_map(base, (first.dtype, everywhere, (unit // number, *steps[1:], 1)))
        if found is None:
            return None
        arguments = (
            *steps, shape[1], shape[3], base, unit // number, (beside.data_ptr() - base) // unit, apart // unit
        )  # fmt: skip
        return cls(
            [(address - base) // unit for address in addresses], tuple(shape), first.dtype, found,
            (beside, *pieces), arguments,
        )  # fmt: skip


def _laid_as(like: Tensor, x: Tensor) -> Tensor:
    """A copy of x with the strides of a tensor of more tokens."""
    return like.new_empty_strided(like.shape, like.stride())[:, :, : x.shape[2]].copy_(x)


@cache
def _kernel(device: torch.device) -> cuda_launch.Kernel:
    made = ("HALF", 0), ("GROUPS", 1), ("MOST", MOST)  # numbers are copied as bits
    return cuda_launch.kernel("constant_decay/cuda/pieces.cu", "pieces", device, made, shared_memory=0, features="a")


__all__ = ["KEPT", "Behind", "InPieces", "Operand", "fetched", "in_place"]
