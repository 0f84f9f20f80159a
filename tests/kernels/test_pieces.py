"""Pieces of a row read where they lie, by the kernels for Hopper: emulated on the CPU, and on a GPU."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import nullcontext

import ptxas
import pytest
import torch
from emulated import emulated, near
from test_hopper_cuda import OWN, SHARED_MEMORY
from test_open_chunk import ON_A_GPU, TILE, draw
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, launches, pieces

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "emulated":
        near()
    with emulated() if request.param == "emulated" else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


def apart(x: Tensor, lengths: list[int], room: int, token_major: bool) -> list[Tensor]:
    """Each piece in memory of its own, among NaNs, with the strides of one of `room` tokens."""
    pieces = []
    for part in x.split(lengths, 2):
        batch, heads, tokens, dim = part.shape
        shape = (batch, room, heads, dim) if token_major else (batch, heads, room, dim)
        memory = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
        place = (memory.transpose(1, 2) if token_major else memory)[:, :, :tokens]
        pieces.append(place.copy_(part))
    return pieces


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "batch", "token_major"),
    [(64, 64, BF16, 2, False), (64, 128, FP16, 1, True), (128, 128, BF16, 2, True), (256, 64, BF16, 1, False)],
)
def test_bits_are_those_of_one_tensor(
    device: str, rows: int, columns: int, dtype: torch.dtype, batch: int, token_major: bool
) -> None:
    """Of any lengths: chunks of many pieces, pieces of many chunks, ends on the grid of chunks."""
    *tensors, g = draw(device, batch, 3 * TILE, rows, columns, dtype, False)
    lengths = [64, 70, 5, 3, 1, 87, 26]
    random.shuffle(lengths)
    lengths.append(3 * TILE - sum(lengths))
    parts = [apart(x, lengths, 144, token_major) for x in tensors]  # which live as long as they are read
    for column in parts:  # one of other strides, as a stream's last piece is
        column[lengths.index(87)] = column[lengths.index(87)].clone(memory_format=torch.contiguous_format)
    laid = pieces.in_place(parts, lengths)
    assert laid is not None
    tiles, results = Tiles(TILE, (0, 3 * TILE)), []
    for q, k, v in (tensors, laid):
        states = torch.full((batch, 2, 3, rows, columns), torch.nan, device=device)
        hopper.tile_states(k, v, g, tiles, reverse=False, out=states)
        o = torch.full_like(tensors[2], torch.nan)
        options = {"scale": 0.3, "state_scale": 0.3, "out_dtype": dtype, "out": o}
        hopper.tile_outputs(q, k, v, states, g, tiles, reverse=False, **options)
        results.append((states, o))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_pieces_that_no_map_knows(device: str) -> None:
    """Are left to those who copy them: of other strides, of odd places, slices of long tensors, or too many."""
    *tensors, _ = draw(device, 1, 2 * TILE, 64, 64, BF16, False)
    lengths = [100, 50, 106]
    parts = [apart(x, lengths, 160, False) for x in tensors]
    assert pieces.in_place(parts, lengths) is not None
    for wrong in (
        [x.contiguous() for x in parts[0]],
        [torch._neg_view(x) for x in parts[0]],
        [x.new_empty(x.numel() + 1)[1:].view(x.shape) for x in parts[0]],
        [x.repeat_interleave(2, 3)[..., ::2] for x in parts[0]],
        [x.new_empty(1, 2, 1000, 64)[:, :, : x.shape[2]] for x in parts[0]],
    ):
        assert pieces.in_place([wrong, *parts[1:]], lengths) is None
    short = [16] * (pieces.MOST + 1)
    assert pieces.in_place([[x[:, :, :16] for _ in short] for x in tensors], short) is None


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize(
    ("rows", "columns", "groups", "dtype"), [(128, 128, 1, BF16), (128, 128, 1, FP16), (256, 64, 2, BF16)]
)
@pytest.mark.parametrize(("name", "way"), [("tile_states", 1), ("tile_outputs", 1), ("tile_outputs", 2)])
def test_compiles_and_fits(name: str, way: int, rows: int, columns: int, groups: int, dtype: torch.dtype) -> None:
    made = launches.defines(name, rows, columns, groups, dtype, False, False, pieces=way)
    memory = launches.shared_memory(name, rows, columns, groups, pieces=way)
    assert 2 // groups * (memory + OWN) <= SHARED_MEMORY
    said = ptxas.report(f"constant_decay/cuda/{name}.cu", "sm_90a", made)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert int(spilled[1]) <= 32, said
    assert "serialized" not in said, said


@ptxas.NEEDS_NVRTC
def test_the_table_compiles() -> None:
    made = ("HALF", 0), ("GROUPS", 1), ("MOST", pieces.MOST)
    assert "0 bytes spill stores" in ptxas.report("constant_decay/cuda/pieces.cu", "sm_90a", made)
