"""Launch configurations of the Triton kernels: checked in, never tuned at run time.

A configuration is part of the meaning of a result (it fixes the order of every sum), so it depends on head sizes,
dtype and chip alone: never on the number of tokens a rank happens to hold, the batch, or a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leetdist.kernels.runtime import triton_release


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


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(dim: int) -> int:
    """The block size that covers a head dimension: a power of two, at least 16 (what the matrix units take)."""
    return max(16, next_power_of_2(dim))


def block_config(rows: int, columns: int, dtype: torch.dtype, tile: int, parts: Parts | None = None) -> Config:
    """Configuration of `tile_states` and `tile_outputs` for a state of `rows` x `columns`.

    The sizes keep a program's fp32 state within 64 KiB of registers and its operands within the 163 KiB of shared
    memory of sm_80, the least of the architectures that tests/kernels/test_kernels_compile.py compiles for. parts: what
    `tile_outputs` is asked for.
    """
    rows, columns = padded(rows), padded(columns)
    wide = dtype == torch.float32
    chunk = min(32 if wide and rows > 64 else 64, tile)
    # Triton 3.7 and 3.8 keep 40 KiB more in shared memory for the outputs' operands in two parts than others do.
    larger = parts is not None and parts.state == 2 and (3, 7) <= triton_release.number() < (3, 9)
    held = min(columns, 32 if (wide or larger) and rows > 128 else 64)
    # With 64 rows, fewer columns and 4 warps, Triton 3.6 compiles 16-bit products on Hopper that give garbage (on an
    # H200: relative error 0.2; right with 8 warps, and with 64 columns).
    warps = 4 if rows < 64 or rows == held == 64 else 8
    return Config(chunk=chunk, columns=held, warps=warps, stages=1 if wide or rows > 128 else 2)
