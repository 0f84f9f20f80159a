"""Hopper (sm_90) in Gluon: launches of hopper_kernels, bf16 and fp16, head sizes of 64 and 128. What CUDA C++ serves
where cuda-core is installed (constant_decay.cuda.hopper), with other roundings."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from leetdist.kernels.common.memory import empty_outputs, empty_states
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.constant_decay.triton.hopper_kernels import tile_outputs_kernel, tile_states_kernel
from leetdist.kernels.runtime import triton_release
from leetdist.kernels.runtime.triton_launch import launch

# Chunks on their way at a time, by (outputs or states, rows): as many as shared memory holds.
STAGES = {("outputs", 128): 2, ("outputs", 64): 3, ("states", 128): 3, ("states", 64): 3}


def chunk_and_warps(kernel: str, rows: int) -> tuple[int, int]:
    """Tokens a product works on, and warps: a warpgroup has 64 rows of the chunk's outputs, or a tile's whole state."""
    return (128, 8) if kernel == "outputs" and rows == 128 else (64, 4)


def part_of_chunk(chunk: int, dtype: torch.dtype) -> int:
    """Tokens whose weighted operands are made at a time: what leaves the fewest numbers of the outputs' kernel for 128
    rows in local memory, by dtype and Triton. No bit depends on it."""
    found = triton_release.number()
    if dtype == torch.bfloat16:
        return min(chunk, 32 if found >= (3, 9) else 64)
    return min(chunk, 128 if found < (3, 7) else 64)


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
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_states."""
    if out is None:
        out = empty_states(b, c, log_decay, tiles)
    if not out.numel():
        return out
    batch, heads = b.shape[0], log_decay.shape[0]
    rows, columns = b.shape[3], c.shape[3]
    chunk, warps = chunk_and_warps("states", rows)
    table = tiles.needed_table(b.device)
    launch(
        tile_states_kernel,
        (batch * heads * tiles.count, 1, 1),
        (
            descriptor_of(b, chunk), descriptor_of(c, chunk), log_decay, out, table, heads, heads // b.shape[1],
            heads // c.shape[1], b.shape[2], tiles.count, tiles.size, tiles.unread(reverse, to_end), scale,
        ),
        {
            "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": chunk, "ROWS": rows, "COLUMNS": columns,
            "STAGES": STAGES["states", rows], "num_warps": warps,
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
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs."""
    if out is None:
        out = empty_outputs(a, c, log_decay, out_dtype)
    if not out.numel():
        return out
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    chunk, warps = chunk_and_warps("outputs", rows)
    table = tiles.needed_table(a.device)
    programs = batch * heads * tiles.count
    again = torch.empty(programs, dtype=torch.int32, device=a.device)  # written by every program
    arguments = (
        descriptor_of(a, chunk), descriptor_of(b, chunk), descriptor_of(c, chunk), states, log_decay, out, again, table,
        *out.stride()[:3], *states.stride(), heads, heads // a.shape[1], heads // b.shape[1], heads // c.shape[1],
        a.shape[2], tiles.count, tiles.size, scale, state_scale, scale_of_added(scale, state_scale),
    )  # fmt: skip
    for walk_again in (False, True):
        launch(
            tile_outputs_kernel,
            (programs, 1, 1),
            arguments,
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": chunk, "ROWS": rows, "COLUMNS": columns,
                "STAGES": STAGES["outputs", rows], "PART": part_of_chunk(chunk, a.dtype), "AGAIN": walk_again,
                "num_warps": warps,
            },
        )  # fmt: skip
    return out


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of these kernels."""
    chunk, warps = chunk_and_warps("outputs", rows)
    return f"chunks of {chunk} tokens, {STAGES['outputs', rows]} under way, {warps} warps a tile"


@cache
def _block(rows: int, columns: int) -> tuple[list[int], gl.NVMMASharedLayout]:
    block = [1, 1, rows, columns]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # and fp16


def descriptor_of(x: Tensor, rows: int) -> TensorDescriptor:
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
