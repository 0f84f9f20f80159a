"""Launch configurations of the Triton kernels: checked in, never tuned at run time.

A configuration is part of the meaning of a result (it fixes the order of every sum), so it depends on head sizes,
dtype and chip alone: never on the number of tokens a rank happens to hold, the batch, or a clock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

from leetdist.kernels.common.release import why_not_gluon
from leetdist.kernels.constant_decay.cuda import hopper as cuda


@dataclass(frozen=True)
class Config:
    """chunk: tokens a product works on; columns: state columns a program holds; warps, stages: Triton's own."""

    chunk: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Parts:
    """Of how many 16-bit numbers operands are the sum: the inputs, the state, the scores, and tokens weighted by their
    decay on the way to the state."""

    inputs: int
    state: int
    scores: int
    weighted: int


def parts_of(dtype: torch.dtype, precision: str | None) -> Parts:
    """The parts for a dtype of the inputs and the `precision` that `linear_attention` was asked for."""
    if dtype == torch.float32:
        return Parts(1, 1, 1, 1) if precision == "tf32" else Parts(2, 2, 2, 2)
    return Parts(1, 2, 2, 2) if precision == "high" else Parts(1, 1, 1, 2)


def on_hopper(rows: int, columns: int, dtype: torch.dtype, parts: Parts, tile: int, device: torch.device) -> bool:
    """Whether constant_decay.triton.hopper serves a problem: as for all configurations, the problem alone decides.
    Heads of 256 are served in CUDA C++ alone, for which something must be installed.

    LEETDIST_HOPPER=0 takes the general kernels instead, which have other roundings.
    """
    return (
        dtype in (torch.bfloat16, torch.float16)
        and parts == parts_of(dtype, None)
        and {rows, columns} <= ({64, 128, 256} if cuda.serves() else {64, 128})
        and tile >= 128
        and device.type == "cuda"
        and _is_hopper(device)
        and os.environ.get("LEETDIST_HOPPER", "1") != "0"
    )


def on_hopper_wide(rows: int, columns: int, dtype: torch.dtype, tile: int, device: torch.device) -> bool:
    """Whether constant_decay.triton.hopper_wide serves a problem that constant_decay.triton.hopper does not."""
    return (
        max(rows, columns) <= 256
        and (dtype != torch.float32 or rows <= 128)
        and rows * dtype.itemsize % 16 == columns * dtype.itemsize % 16 == 0  # what bulk copies ask for
        and tile >= 64
        and device.type == "cuda"
        and _is_hopper(device)
        and os.environ.get("LEETDIST_HOPPER", "1") != "0"
    )


@cache
def _is_hopper(device: torch.device) -> bool:
    """sm_90, and a Triton that has the dialect the kernels are written in."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return why_not_gluon() is None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(dim: int) -> int:
    """The block size that covers a head dimension: a power of two, at least 16 (what the matrix units take)."""
    return max(16, next_power_of_2(dim))


def block_config(rows: int, columns: int, dtype: torch.dtype, tile: int) -> Config:
    """Configuration of `tile_states` and `tile_outputs` for a state of `rows` x `columns`.

    The sizes keep a program's fp32 state within 64 KiB of registers and its operands within the 163 KiB of shared
    memory of sm_80, the least of the architectures that tests/kernels/test_kernels_compile.py compiles for.
    """
    rows, columns = padded(rows), padded(columns)
    wide = dtype == torch.float32
    chunk = min(32 if wide and rows > 64 else 64, tile)
    held = min(columns, 32 if wide and rows > 128 else 64)
    # With 64 rows, fewer columns and 4 warps, Triton 3.6 compiles 16-bit products on Hopper that give garbage (on an
    # H200: relative error 0.2; right with 8 warps, and with 64 columns).
    warps = 4 if rows < 64 or rows == held == 64 else 8
    return Config(chunk=chunk, columns=held, warps=warps, stages=1 if wide or rows > 128 else 2)
