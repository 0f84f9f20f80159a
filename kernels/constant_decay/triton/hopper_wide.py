"""Launches of constant_decay.triton.hopper_wide_kernels: their shapes, and the descriptors that bulk copies need."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from leetdist.kernels.common.memory import empty_outputs, empty_states
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.constant_decay.triton.configs import Parts, padded, parts_of
from leetdist.kernels.constant_decay.triton.hopper import descriptor_of
from leetdist.kernels.constant_decay.triton.hopper_wide_kernels import tile_outputs_kernel, tile_states_kernel
from leetdist.kernels.runtime.triton_launch import launch

CHUNK = 64
# Chunks in shared memory in the pass for states: one in use, one about to be, the rest on their way.
STAGES = 3
ELEMENTS = {torch.float32: gl.float32, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def block(rows: int, columns: int, parts: Parts) -> tuple[int, int, int]:
    """Rows (all) and columns of the state that a program holds, and its warps. With two parts of 256 rows, shared
    memory is full at 64 columns; of 64 x 64, two programs fit a multiprocessor."""
    held = max(64, padded(rows))
    most = 64 if held == 256 and parts.state == 2 else 128
    held_columns = min(most, max(64, padded(columns)))
    return held, held_columns, 4 if held == held_columns == 64 else 8


def tile_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float = 1.0,
    to_end: bool = True,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_states; `precision` is that of `linear_attention`."""
    if out is None:
        out = empty_states(b, c, log_decay, tiles)
    if not out.numel():
        return out
    parts, unread = parts_of(b.dtype, precision), tiles.unread(reverse, to_end)
    batch, heads = b.shape[0], log_decay.shape[0]
    rows, columns = b.shape[3], c.shape[3]
    held_rows, held_columns, warps = block(rows, columns, parts)
    table = tiles.needed_table(b.device)
    launch(
        tile_states_kernel,
        (batch * heads * tiles.count * ceil_div(columns, held_columns), 1, 1),
        (
            _operand(b, held_rows), _operand(c, held_columns), log_decay, out, table, heads,
            heads // b.shape[1], heads // c.shape[1], b.shape[2], tiles.count, tiles.size, unread, rows, columns,
            out.stride(2), scale,
        ),
        {
            "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": CHUNK, "ROWS": held_rows, "COLUMNS": held_columns,
            "PARTS": parts.inputs, "WEIGHTED_PARTS": parts.weighted, "STAGES": STAGES,
            "num_warps": warps,
        },
    )  # fmt: skip
    return out


def tile_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    onto: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.triton.block.tile_outputs."""
    if out is None:
        out = empty_outputs(a, c, log_decay, out_dtype)
    if not out.numel():
        return out
    parts = parts_of(a.dtype, precision)
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    held_rows, held_columns, warps = block(rows, columns, parts)
    table = tiles.needed_table(a.device)
    programs = batch * heads * tiles.count * ceil_div(columns, held_columns)
    again = torch.empty(programs, dtype=torch.int32, device=a.device)  # written by every program
    arguments = (
        _operand(a, held_rows), _operand(b, held_rows), _operand(c, held_columns), states, log_decay, out, again, table,
        onto, *out.stride()[:3], *((0, 0, 0) if onto is None else onto.stride()[:3]), *states.stride(),
        heads, heads // a.shape[1], heads // b.shape[1], heads // c.shape[1],
        a.shape[2], tiles.count, tiles.size, rows, columns, scale, state_scale, scale_of_added(scale, state_scale),
    )  # fmt: skip
    for walk_again in (False, True):
        launch(
            tile_outputs_kernel,
            (programs, 1, 1),
            arguments,
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": CHUNK, "ROWS": held_rows,
                "COLUMNS": held_columns, "PARTS": parts.inputs, "STATE_PARTS": parts.state,
                "SCORE_PARTS": parts.scores, "WEIGHTED_PARTS": parts.weighted, "AGAIN": walk_again, "num_warps": warps,
            },
        )  # fmt: skip
    return out


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of these kernels."""
    held, held_columns, warps = block(rows, columns, parts_of(dtype, precision))
    return f"chunks of {CHUNK} tokens, a state of {held} x {held_columns} and {warps} warps a program"


def _operand(x: Tensor, width: int) -> TensorDescriptor:
    """Bulk copies of CHUNK tokens and `width` columns, zero outside."""
    found = descriptor_of(x, CHUNK)
    found.block_shape = [1, 1, CHUNK, width]
    found.layout = _layout(width, x.dtype)
    found.key = (CHUNK, width, x.dtype)
    return found


@cache
def _layout(width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, CHUNK, width], ELEMENTS[dtype])
