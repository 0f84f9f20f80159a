"""Launches of the kernels for Hopper (sm_90): their shapes, and the descriptors that bulk copies need."""

from __future__ import annotations

from functools import cache

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from leetdist.kernels.pytorch.block import scale_of_added
from leetdist.kernels.tiles import Tiles
from leetdist.kernels.triton.hopper_kernels import tile_outputs_kernel, tile_states_kernel
from leetdist.kernels.triton.launch import launch

# Chunks on their way at a time, by (outputs or states, rows): as many as shared memory holds.
STAGES = {("outputs", 128): 2, ("outputs", 64): 3, ("states", 128): 3, ("states", 64): 4}


def chunk_and_warps(rows: int) -> tuple[int, int]:
    """Tokens a product works on, and warps: a warpgroup has 64 rows of the chunk's outputs, and of the state."""
    return (128, 8) if rows == 128 else (64, 4)


def tile_states(
    b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles, out: Tensor, *, reverse: bool, scale: float
) -> None:
    """See leetdist.kernels.pytorch.block.tile_states."""
    batch, heads = b.shape[0], log_decay.shape[0]
    rows, columns = b.shape[3], c.shape[3]
    chunk, warps = chunk_and_warps(rows)
    table = None if tiles.regular else tiles.table(b.device)
    launch(
        tile_states_kernel,
        (batch * heads * tiles.count, 1, 1),
        (
            _descriptor(b, chunk), _descriptor(c, chunk), log_decay, out, table, heads, heads // b.shape[1],
            heads // c.shape[1], b.shape[2], tiles.count, tiles.size, scale,
        ),
        {
            "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": chunk, "ROWS": rows, "COLUMNS": columns,
            "STAGES": STAGES["states", rows], "num_warps": warps,
        },
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
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    chunk, warps = chunk_and_warps(rows)
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


@cache
def _block(rows: int, columns: int) -> tuple[list[int], gl.NVMMASharedLayout]:
    block = [1, 1, rows, columns]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # and fp16


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Bulk copies of `rows` tokens of one head of x (B, H, N, D), bf16 or fp16."""
    strides = _strides(x)
    if x.data_ptr() % 16 or any(stride % 8 or stride == 0 for stride in strides):
        x = x.contiguous()  # what bulk copies ask for
        strides = _strides(x)
    found = TensorDescriptor.__new__(TensorDescriptor)  # its own checks take as long as a launch
    found.base, found.shape, found.strides, found.padding = x, x.shape, (*strides, 1), "zero"
    found.block_shape, found.layout = _block(rows, x.shape[3])
    found.key = (rows, x.shape[3], x.dtype)
    return found


def _strides(x: Tensor) -> list[int]:
    """Of batch, head and token; where there is but one, a stride means nothing, and is one that is allowed."""
    return [stride if size > 1 else 8 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
