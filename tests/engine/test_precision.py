"""What `precision` promises: errors against fp64, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import leetdist
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as exact
from leetdist.reference import relative_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# dtype, precision: the largest relative error, and the least, so that a switch that does nothing fails.
PROMISED = {
    (torch.float32, None): (0.0, 1e-6),
    (torch.float32, "tf32"): (1e-5, 1e-3),
    (torch.bfloat16, None): (1.9e-3, 2.7e-3),
    (torch.bfloat16, "high"): (0.0, 1.85e-3),
    (torch.float16, None): (2.4e-4, 4e-4),
    (torch.float16, "high"): (0.0, 2.4e-4),
}


def draw(heads: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device, size: float = 1.0) -> Tensor:
    return (size * torch.randn(1, tokens, heads, dim, device=device)).to(dtype).transpose(1, 2)


def errors(
    dtype: torch.dtype, precision: str | None, device: torch.device, rows: int, columns: int, tokens: int, tile: int
) -> list[float]:
    """Relative errors of o, dq, dk, dv against fp64."""
    q, k, v, do = (draw(2, tokens, dim, dtype, device) for dim in (rows, rows, columns, columns))
    decay = torch.tensor([-1e-3, -0.3], device=device)

    def both(dtype: torch.dtype, **options: str | None) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        o = leetdist.linear_attention(*leaves, decay.to(dtype if dtype == torch.float64 else torch.float32),
                                      scale=rows**-0.5, tile=tile, **options)  # fmt: skip
        return [o, *torch.autograd.grad(o, leaves, do.to(dtype))]

    measured = both(dtype, method="block", precision=precision)
    with pytest.MonkeyPatch.context() as patch:  # fp64 takes PyTorch's kernels
        patch.setenv("LEETDIST_BACKEND", "torch")
        expected = both(torch.float64)
    return [relative_error(x, y) for x, y in zip(measured, expected, strict=True)]


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "precision"), [key for key in PROMISED if key[0] != torch.bfloat16])
def test_errors_interpreted(dtype: torch.dtype, precision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LEETDIST_BACKEND", "triton")
    least, most = PROMISED[dtype, precision]
    measured = errors(dtype, precision, CPU, 32, 16, 150, 64)
    assert max(measured) < most
    assert max(measured) > least


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 64), (256, 256), (64, 256), (40, 72)])
@pytest.mark.parametrize(("dtype", "precision"), PROMISED)
def test_errors(dtype: torch.dtype, precision: str | None, rows: int, columns: int) -> None:
    least, most = PROMISED[dtype, precision]
    measured = errors(dtype, precision, CUDA, rows, columns, 5000, 1024)
    assert max(measured) < most
    assert max(measured) > least


@pytest.mark.parametrize(
    "device", [pytest.param(CPU, marks=pytest.mark.interpreter), pytest.param(CUDA, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_fp32_keeps_its_range(size: float, device: torch.device) -> None:
    """Numbers far outside fp16's range, tokens without any, and a token among them that dwarfs the rest."""
    from leetdist.kernels.constant_decay.triton import block

    tiles = Tiles(128, (0, 300))
    a, b, c = (draw(2, 300, 64, torch.float32, device, size) for _ in range(3))
    c[:, :, 64:128] = 0
    b[:, :, 200] *= 1e4
    decay = torch.tensor([-0.01, -0.5], device=device)
    states = size**2 * torch.randn(1, 2, tiles.count, 64, 64, device=device)
    options = {"reverse": False, "scale": 1.0, "state_scale": 1.0}
    o = block.tile_outputs(a, b, c, states, decay, tiles, out_dtype=torch.float32, **options)
    expected = exact.tile_outputs(
        *(x.double() for x in (a, b, c, states)), decay, tiles, out_dtype=torch.float64, **options
    )
    assert relative_error(o, expected) < 1e-6
    assert relative_error(o[:, :, :200], expected[:, :, :200]) < 1e-6
    added = block.tile_states(b, c, decay, tiles, reverse=True)
    assert relative_error(added, exact.tile_states(b.double(), c.double(), decay, tiles, reverse=True)) < 1e-6


@pytest.mark.parametrize(
    "device", [pytest.param(CPU, marks=pytest.mark.interpreter), pytest.param(CUDA, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_bit_depends_on_later_tokens(dtype: torch.dtype, device: torch.device) -> None:
    """However large they are: units of fp32 numbers must not be those of the whole chunk."""
    from leetdist.kernels.constant_decay.triton import block

    tiles = Tiles(128, (0, 128))
    a, b, c = (draw(2, 128, 64, dtype, device) * torch.logspace(-3, 0, 64, device=device).to(dtype) for _ in range(3))
    decay, states = torch.tensor([-0.01, -0.5], device=device), torch.randn(1, 2, 1, 64, 64, device=device)

    def outputs() -> Tensor:
        return block.tile_outputs(
            a, b, c, states, decay, tiles, reverse=False, scale=1.0, state_scale=1.0, out_dtype=dtype
        )

    before = outputs()
    for x in (a, b, c):
        x[:, :, 37:] *= 3000
    assert torch.equal(outputs()[:, :, :37], before[:, :, :37])


@pytest.mark.parametrize("precision", ["tf32", "high"])
def test_pytorch_kernels_compute_in_fp32_anyway(precision: str) -> None:
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    assert torch.equal(leetdist.linear_attention(q, k, v, precision=precision), leetdist.linear_attention(q, k, v))


def test_ranks_must_agree() -> None:
    def call(group: object) -> str:
        q, k, v = (torch.randn(1, 2, 32, 16) for _ in range(3))
        with pytest.raises(ValueError, match="disagree on precision: rank 1 has high, rank 0 has None"):
            leetdist.linear_attention(q, k, v, group=group, precision="high" if group.rank else None)
        return "refused"

    assert leetdist.virtual_ranks(call, 2) == ["refused"] * 2
