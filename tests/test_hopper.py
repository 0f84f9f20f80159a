"""The Hopper kernels on a Hopper GPU: against PyTorch in fp64, and which problems they serve."""

from __future__ import annotations

import pytest
import torch

from leetdist.kernels.pytorch import block as exact
from leetdist.kernels.tiles import Tiles
from leetdist.kernels.triton.configs import on_hopper, on_hopper_wide, parts_of
from leetdist.reference import relative_error

triton_block = pytest.importorskip("leetdist.kernels.triton.block")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TILES = [Tiles(256, (0, 256)), Tiles(512, (0, 1300)), Tiles(128, (0, 128, 300, 300, 301, 905))]
# Two roundings of the output's size: its own, and the state's.
ERROR = {torch.bfloat16: 3e-3, torch.float16: 6e-4}


def test_every_backend_has_every_primitive():
    for backend in (exact, triton_block):
        for name in ("tile_states", "fold", "tile_outputs", "decay_gradient"):
            assert callable(getattr(backend, name))


def test_serves_by_the_problem_alone():
    cpu = torch.device("cpu")
    assert not on_hopper(128, 128, torch.bfloat16, parts_of(torch.bfloat16, None), 1024, cpu)
    assert not on_hopper_wide(128, 128, torch.float32, 1024, cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: f"{tiles.size}-{tiles.bounds[-1]}")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["BHND", "BNHD"])
def test_against_fp64(order, dtype, rows, columns, reverse, tiles):
    assert on_hopper(rows, columns, dtype, parts_of(dtype, None), tiles.size, torch.device("cuda", 0))

    def draw(heads, dim):
        if order == "BHND":
            return torch.randn(2, heads, tiles.num_tokens, dim, device="cuda").to(dtype)
        return torch.randn(2, tiles.num_tokens, heads, dim, device="cuda").to(dtype).transpose(1, 2)

    a, b, c = draw(4, rows), draw(2, rows), draw(2, columns)
    log_decay = torch.tensor([0.0, -0.01, -0.5, -5.0], device="cuda")
    # A state beyond fp16's range, which the kernels must hold all the same.
    states = 1e6 * torch.randn(2, 4, tiles.count, rows, columns, device="cuda")
    options = {"reverse": reverse, "scale": 1e-6, "state_scale": 1e-6}
    out = triton_block.tile_outputs(a, b, c, states, log_decay, tiles, out_dtype=dtype, **options)
    expected = exact.tile_outputs(
        a.double(), b.double(), c.double(), states.double(), log_decay, tiles,
        out_dtype=torch.float64, **options,
    )  # fmt: skip
    added = triton_block.tile_states(b, c, log_decay, tiles, reverse=reverse, scale=0.3)
    expected_added = exact.tile_states(b.double(), c.double(), log_decay, tiles, reverse=reverse, scale=0.3)
    for head in range(4):
        assert relative_error(out[:, head], expected[:, head]) < ERROR[dtype]
        assert relative_error(added[:, head], expected_added[:, head]) < ERROR[dtype]
