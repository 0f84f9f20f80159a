"""Hopper (sm_90): the CUDA C++ kernels where cuda-core is installed, and where it is not, launches of those in Gluon.

Their roundings differ, so the ranks of a group agree on which of them computes (leetdist.operators.methods.served_by).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from leetdist.kernels.common.launch import launch
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper as cuda
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.constant_decay.triton.hopper_kernels import tile_outputs_kernel, tile_states_kernel

# Chunks on their way at a time, by (outputs or states, rows): as many as shared memory holds.
STAGES = {("outputs", 128): 2, ("outputs", 64): 3, ("states", 128): 3, ("states", 64): 3}


def chunk_and_warps(kernel: str, rows: int) -> tuple[int, int]:
    """Tokens a product works on, and warps: a warpgroup has 64 rows of the chunk's outputs, or a tile's whole state."""
    return (128, 8) if kernel == "outputs" and rows == 128 else (64, 4)


def tile_states(
    b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles, out: Tensor, *, reverse: bool, scale: float, unread: int
) -> None:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_states."""
    if cuda.serves():
        return cuda.tile_states(b, c, log_decay, tiles, out, reverse=reverse, scale=scale, unread=unread)
    batch, heads = b.shape[0], log_decay.shape[0]
    rows, columns = b.shape[3], c.shape[3]
    chunk, warps = chunk_and_warps("states", rows)
    table = None if tiles.regular else tiles.table(b.device)
    launch(
        tile_states_kernel,
        (batch * heads * tiles.count, 1, 1),
        (
            _descriptor(b, chunk), _descriptor(c, chunk), log_decay, out, table, heads, heads // b.shape[1],
            heads // c.shape[1], b.shape[2], tiles.count, tiles.size, unread, scale,
        ),
        {
            "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": chunk, "ROWS": rows, "COLUMNS": columns,
            "STAGES": STAGES["states", rows], "num_warps": warps,
        },
    )  # fmt: skip
    return None


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
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs."""
    if cuda.serves():
        scales = {"scale": scale, "state_scale": state_scale}
        return cuda.tile_outputs(a, b, c, states, log_decay, tiles, out, reverse=reverse, **scales)
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    chunk, warps = chunk_and_warps("outputs", rows)
    table = None if tiles.regular else tiles.table(a.device)
    launch(
        tile_outputs_kernel,
        (batch * heads * tiles.count, 1, 1),
        (
            _descriptor(a, chunk), _descriptor(b, chunk), _descriptor(c, chunk), states, log_decay, out, table,
            *out.stride()[:3], *states.stride(), heads, heads // a.shape[1], heads // b.shape[1], heads // c.shape[1],
            a.shape[2], tiles.count, tiles.size, scale, state_scale, scale_of_added(scale, state_scale),
        ),
        {
            "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": chunk, "ROWS": rows, "COLUMNS": columns,
            "STAGES": STAGES["outputs", rows], "num_warps": warps,
        },
    )  # fmt: skip
    return None


@cache
def _block(rows: int, columns: int) -> tuple[list[int], gl.NVMMASharedLayout]:
    block = [1, 1, rows, columns]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # and fp16


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Bulk copies of `rows` tokens of one head of x (B, H, N, D), bf16 or fp16."""
    strides = _strides(x)
    if x.data_ptr() % 16 or any(stride % 8 or stride == 0 for stride in strides):
        x = x.clone(memory_format=torch.contiguous_format)  # what bulk copies ask for
        strides = _strides(x)
    found = TensorDescriptor.__new__(TensorDescriptor)  # its own checks take as long as a launch
    found.base, found.shape, found.strides, found.padding = x, x.shape, (*strides, 1), "zero"
    found.block_shape, found.layout = _block(rows, x.shape[3])
    found.key = (rows, x.shape[3], x.dtype)
    return found


def _strides(x: Tensor) -> list[int]:
    """Of batch, head and token; where there is but one, a stride means nothing, and is one that is allowed."""
    return [stride if size > 1 else 8 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
