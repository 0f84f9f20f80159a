"""Launches of tile_states.cu and tile_outputs.cu: Hopper (sm_90), bf16 and fp16, head sizes of 64 and 128.

Shapes and meaning are those of leetdist.kernels.pytorch.block. The order of every sum depends on the head sizes and the
tile length alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.cuda import loader
from leetdist.kernels.pytorch.block import scale_of_added
from leetdist.kernels.tiles import Tiles

THREADS = 128
BLOCK = 64 * 64 * 2  # bytes of 64 tokens of 64 numbers
STAGES = {"tile_states": 3, "tile_outputs": 2}
# Beside the chunks: tables and barriers, what rounds the first address up to 1,024, and the scores.
OTHERS = {"tile_states": 2048, "tile_outputs": 3072 + BLOCK}
MAPS_KEPT = 1024

_maps: dict[tuple[Any, ...], TensorMap] = {}


def serves() -> bool:
    """As leetdist.methods.cuda_serves, for problems that leetdist.kernels.triton.configs.on_hopper admits."""
    return os.environ.get("LEETDIST_BACKEND") is None and loader.available()


def tile_states(
    b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles, out: Tensor, *, reverse: bool, scale: float
) -> None:
    """See leetdist.kernels.pytorch.block.tile_states."""
    heads = log_decay.shape[0]
    b, c = _aligned(b), _aligned(c)
    launch = _kernel("tile_states", b.shape[3], c.shape[3], b.dtype, False, reverse, b.device)
    launch(
        (b.shape[0] * heads * tiles.count,), THREADS,
        _map(b), heads // b.shape[1], _map(c), heads // c.shape[1], out.data_ptr(), *_tiles(tiles, b, log_decay),
        float(scale),
    )  # fmt: skip


def tile_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    out: Tensor,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
) -> None:
    """See leetdist.kernels.pytorch.block.tile_outputs."""
    heads = log_decay.shape[0]
    a, b, c = _aligned(a), _aligned(b), _aligned(c)
    # 16-bit outputs leave by bulk copies; for others any map will do.
    wide = out.dtype != a.dtype
    target = out if wide or _serves_copies(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    launch = _kernel("tile_outputs", a.shape[3], c.shape[3], a.dtype, wide, reverse, a.device)
    launch(
        (a.shape[0] * heads * tiles.count,), THREADS,
        _map(a), heads // a.shape[1], _map(b), heads // b.shape[1], _map(c), heads // c.shape[1],
        states.data_ptr(), *states.stride(), _map(c if wide else target), target.data_ptr(), *target.stride()[:3],
        *_tiles(tiles, b, log_decay),
        float(scale), float(state_scale), scale_of_added(float(scale), float(state_scale)),
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def shared_memory(name: str, rows: int, columns: int) -> int:
    """Bytes that a block asks for."""
    operands = columns + rows * (1 if name == "tile_states" else 2)
    return STAGES[name] * operands // 64 * BLOCK + OTHERS[name]


def defines(rows: int, columns: int, dtype: torch.dtype, wide: bool, reverse: bool) -> tuple[tuple[str, int], ...]:
    """What a kernel is compiled with; `wide`: for outputs in fp32."""
    return (
        ("ROWS", rows), ("COLUMNS", columns), ("HALF", int(dtype == torch.float16)), ("WIDE", int(wide)),
        ("REVERSE", int(reverse)),
    )  # fmt: skip


@cache
def _kernel(
    name: str, rows: int, columns: int, dtype: torch.dtype, wide: bool, reverse: bool, device: torch.device
) -> Callable[..., None]:
    made = defines(rows, columns, dtype, wide, reverse)
    memory = shared_memory(name, rows, columns)
    return loader.kernel(f"{name}.cu", name, device, made, shared_memory=memory, features="a")


def _tiles(tiles: Tiles, b: Tensor, log_decay: Tensor) -> tuple[int, ...]:
    table = 0 if tiles.regular else tiles.table(b.device).data_ptr()
    return log_decay.data_ptr(), table, log_decay.shape[0], tiles.count, tiles.size, b.shape[2]


def _serves_copies(x: Tensor) -> bool:
    """Bulk copies want multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(
        size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in zip(x.shape[:3], x.stride(), strict=False)
    )


def _aligned(x: Tensor) -> Tensor:
    return x if _serves_copies(x) else x.clone(memory_format=torch.contiguous_format)


class TensorMap(bytes):
    """How the copy engine knows a tensor; `address` and `kind` are what it was made from."""

    address: int
    kind: tuple[torch.dtype, torch.Size, tuple[int, ...]]


def _map(x: Tensor) -> TensorMap:
    return tensor_map(x.data_ptr(), (x.dtype, x.shape, x.stride()))


def tensor_map(address: int, kind: tuple[torch.dtype, torch.Size, tuple[int, ...]]) -> TensorMap:
    """(batch, heads, tokens, dim), 16-bit, of a dtype, shape and strides, in blocks of 64 tokens x 64 numbers."""
    found = _maps.get((address, kind))
    if found is None:
        if len(_maps) >= MAPS_KEPT:
            _maps.clear()
        _maps[address, kind] = found = TensorMap(_encode(address, *kind))
        found.address, found.kind = address, kind
    return found


def _encode(address: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> bytes:
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if dtype == torch.float16 else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    # The stride of what there is one of means nothing, but must be allowed.
    steps = [2 * stride if size > 1 else 16 for size, stride in zip(shape[:3], strides, strict=False)]
    result, made = driver.cuTensorMapEncodeTiled(
        kind,
        4,
        address,
        [driver.cuuint64_t(size) for size in reversed(shape)],
        [driver.cuuint64_t(step) for step in reversed(steps)],
        [driver.cuuint32_t(size) for size in (64, 64, 1, 1)],
        [driver.cuuint32_t(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    loader.check(result)
    return ctypes.string_at(int(made.getPtr()), 128)
