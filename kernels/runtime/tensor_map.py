"""Tensors as Hopper's copy engine (TMA) knows them."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.memo import Memo

MAP_BYTES = 128


class TensorMap(bytes):
    """How the copy engine knows a tensor; `address` and `kind` are what it was made from."""

    address: int
    kind: tuple[torch.dtype, torch.Size, tuple[int, ...]]


_maps: Memo[tuple[int, Any], TensorMap | None] = Memo(1024)


def tensor_map(address: int, kind: tuple[torch.dtype, torch.Size, tuple[int, ...]]) -> TensorMap | None:
    """The map of a 16-bit tensor (batch, heads, tokens, dim), by its address, dtype, shape and strides, in blocks of
    64 tokens x 64 numbers; None where it is not made of multiples of 16 bytes."""
    key = address, kind
    if key not in _maps:
        _maps[key] = _encode(address, *kind)
    return _maps[key]


def map_of(x: torch.Tensor) -> TensorMap | None:
    """The same of x (batch, heads, tokens, dim) itself."""
    return tensor_map(x.data_ptr(), (x.dtype, x.shape, x.stride()))


def _encode(address: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> TensorMap | None:
    described = None if address % 16 else _described(dtype, shape, strides)
    if described is None:
        return None
    from cuda.bindings import driver

    cuda_launch.bind()
    kind, rank, *more = described
    result, made = driver.cuTensorMapEncodeTiled(kind, rank, address, *more)
    cuda_launch.check(result)
    found = TensorMap(ctypes.string_at(int(made.getPtr()), MAP_BYTES))
    found.address, found.kind = address, (dtype, shape, strides)
    return found


@lru_cache(maxsize=512)
def _described(dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> tuple[Any, ...] | None:
    """What the driver is told beside the address: for other addresses, as pieces of a stream have, it is not made
    again, which is most of the time that a map takes."""
    # The stride of what there is one of means nothing, but must be allowed.
    distances = [2 * stride if size > 1 else 16 for size, stride in zip(shape[:3], strides, strict=False)]
    if any(distance <= 0 or distance % 16 for distance in distances):
        return None
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if dtype == torch.float16 else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    return (
        kind,
        4,
        [driver.cuuint64_t(size) for size in reversed(shape)],
        [driver.cuuint64_t(distance) for distance in reversed(distances)],
        [driver.cuuint32_t(size) for size in (64, 64, 1, 1)],
        [driver.cuuint32_t(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
