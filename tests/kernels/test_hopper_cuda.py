"""The CUDA C++ kernels for Hopper compile for it as they were designed: they fit, and ptxas serializes no product."""

from __future__ import annotations

import re
from types import SimpleNamespace

import ptxas
import pytest
import torch

from leetdist.kernels.constant_decay.cuda import launches
from leetdist.kernels.constant_decay.cuda.operands import operand_arguments
from leetdist.kernels.runtime import cuda_launch, nvrtc, tensor_map

# Bytes of a multiprocessor's shared memory, and what a block takes of it beside what it asks for.
SHARED_MEMORY, OWN = 228 * 1024, 1024
# Bytes a thread may keep in local memory.
SPILLS = {False: 32, True: 160}


OF_SIZES = [  # rows, columns, warpgroups, dtype, outputs in fp32, reversed, a decay a token
    (128, 128, 1, torch.bfloat16, False, False, False),
    (128, 128, 1, torch.bfloat16, False, False, True),
    (128, 128, 1, torch.bfloat16, False, True, False),
    (128, 128, 1, torch.float16, True, True, False),
    (128, 128, 1, torch.float16, True, True, True),
    (64, 64, 1, torch.bfloat16, False, False, False),
    (64, 128, 1, torch.bfloat16, True, True, False),
    (128, 64, 1, torch.bfloat16, False, False, False),
    (256, 64, 1, torch.bfloat16, False, False, False),
    (256, 64, 1, torch.float16, True, True, False),
    (256, 64, 2, torch.bfloat16, False, False, False),
    (256, 64, 2, torch.bfloat16, True, True, False),
    (256, 64, 2, torch.float16, False, True, False),
    (256, 64, 2, torch.float16, True, False, False),
    (256, 64, 2, torch.float16, True, False, True),
]
# The second look is compiled for fewer: of each number of rows and warpgroups, dtype and direction.
COMPILED = [(name, *size) for name in ("tile_states", "tile_outputs") for size in OF_SIZES]
COMPILED += [(launches.AGAIN, *size) for size in OF_SIZES[2::4]]


def test_all_fit():
    for rows, columns, groups, *_, token in OF_SIZES:
        for name in ("tile_states", *launches.OUTPUTS):
            blocks = 1 if name == launches.AGAIN else 2 // groups  # to a multiprocessor
            assert blocks * (launches.shared_memory(name, rows, columns, groups, token) + OWN) <= SHARED_MEMORY


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize(("name", "rows", "columns", "groups", "dtype", "wide", "reverse", "token"), COMPILED)
def test_compiles(name, rows, columns, groups, dtype, wide, reverse, token):
    said = ptxas.report(
        f"constant_decay/cuda/{name.split()[0]}.cu",
        "sm_90a",
        launches.defines(name, rows, columns, groups, dtype, wide, reverse, token),
    )
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert name == launches.AGAIN or int(spilled[1]) <= SPILLS[wide], said
    assert "serialized" not in said, said


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize(
    ("size", "dtype", "wide", "onto", "token"),
    [
        ((96, 112), torch.bfloat16, False, False, False),
        ((160, 160), torch.bfloat16, False, False, False),
        ((192, 256), torch.float16, True, False, True),
        ((192, 192), torch.bfloat16, False, False, True),
        ((192, 184), torch.float16, True, False, False),
        ((256, 512), torch.bfloat16, False, True, False),
        ((256, 200), torch.float16, True, True, True),
    ],
)
@pytest.mark.parametrize("name", ["tile_states", "tile_outputs"])
def test_other_sizes_compile_and_fit(name, size, dtype, wide, onto, token):
    """Fewer rows and columns than are walked, an odd number of warpgroups, and outputs that are added to others."""
    for part in launches.parts(4096, *size, 132):
        held = launches.walked_rows(size[0]), part.columns, part.groups
        made = launches.defines(name, *held, dtype, wide, onto, token, size=size, first=part.first, onto=onto)
        said = ptxas.report(f"constant_decay/cuda/{name}.cu", "sm_90a", made)
        blocks = 2 if part.groups == 1 else 1
        assert blocks * (launches.shared_memory(name, *held, token) + OWN) <= SHARED_MEMORY
        spilled = re.search(r"(\d+) bytes spill stores", said)
        assert spilled, said
        assert int(spilled[1]) <= SPILLS[wide], said
        assert "serialized" not in said, said


@pytest.mark.parametrize("programs", [1, 33, 66, 132, 133, 4096])
@pytest.mark.parametrize("rows", [64, 128, 192, 256])
@pytest.mark.parametrize("columns", [8, 64, 96, 128, 192, 256, 320, 512])
def test_shares_cover_all_columns(columns, rows, programs):
    held, groups, splits = launches.shares(programs, rows, columns, multiprocessors=132)
    assert held * groups * splits == 64 * -(-columns // 64)
    assert held * rows <= 128 * 128  # what the registers of a warpgroup hold
    assert groups * splits <= max(4, -(-columns // 64))
    first = 0
    for part in launches.parts(programs, rows, columns, 132):
        assert part.first == first
        first += part.columns * part.groups * part.splits
    assert first == held * groups * splits


def test_a_source_holds_what_it_includes():
    text = nvrtc.text("constant_decay/cuda/tile_outputs.cu")
    assert "#include" not in text
    assert text.count("wgmma.fence") == 1


def test_maps_of_one_layout_share_what_the_driver_is_told(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    told = []
    memory = torch.zeros(tensor_map.MAP_BYTES, dtype=torch.uint8)

    def encode(*given):
        told.append(given)
        return 0, SimpleNamespace(getPtr=memory.data_ptr)

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    monkeypatch.setattr(cuda_launch, "bind", lambda: None)
    monkeypatch.setattr(tensor_map, "_maps", {})
    kind = torch.bfloat16, torch.Size((1, 2, 100, 64)), (5, 6400, 64, 1)
    first, second = tensor_map.tensor_map(512, kind), tensor_map.tensor_map(1024, kind)
    assert first == second == bytes(tensor_map.MAP_BYTES)
    assert (first.address, second.address, second.kind) == (512, 1024, kind)
    assert [given[2] for given in told] == [512, 1024]
    assert all(x is y for place, (x, y) in enumerate(zip(*told, strict=True)) if place != 2)
    assert [[int(x) for x in numbers] for numbers in told[0][3:5]] == [[64, 100, 2, 1], [128, 12800, 16]]
    assert tensor_map.tensor_map(520, kind) is None
    assert tensor_map.tensor_map(512, (*kind[:2], (12800, 6400, 60, 1))) is None


def test_copies_of_what_the_copy_engine_cannot_read_live_until_the_launch(monkeypatch):
    monkeypatch.setattr(tensor_map, "_maps", {})
    monkeypatch.setattr(
        tensor_map, "_encode", lambda address, _, __, strides: None if strides[2] % 8 else b"%d" % address
    )
    wrong = [torch.randn(1, 2, 16, 65)[..., 1:] for _ in range(3)]
    kept: list[torch.Tensor] = []
    maps = [operand_arguments(x, 4, kept) for x in wrong]
    assert maps == [(b"%d" % x.data_ptr(), 2) for x in kept]
    assert len({found for found, _ in maps}) == 3
    assert all(torch.equal(x, y) for x, y in zip(kept, wrong, strict=True))
