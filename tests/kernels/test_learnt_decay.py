"""A decay a head that is learnt (kernels/token_decay/cuda/by_head.py): two passes with the decays of tokens, and a
head's gradient from theirs; on the CPU, emulated or interpreted, and on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_two_passes import BF16, ON_A_GPU, SCALE, emulation
from torch import Tensor

import leetdist
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as exact
from leetdist.kernels.token_decay.cuda import by_head
from leetdist.reference import relative_error

between = pytest.importorskip("leetdist.kernels.token_decay.triton.by_head")
__all__ = ["emulation"]
# From none to one that leaves nothing of a chunk.
DECAYS = (0.0, 1e-4, 0.003, 0.03, 0.1, 0.3, 1.0, 30.0)


def draw(device: str, tiles: Tiles, decays: tuple[float, ...], batch: int = 1) -> list[Tensor]:
    """q, k, v, do, states, gradients of states as a call has them, in fp32, and log_decay."""
    heads = len(decays)
    q, k, v, do = (torch.randn(batch, heads, tiles.num_tokens, 128).to(device, BF16) for _ in range(4))
    log_decay = -torch.tensor(decays, device=device)
    states = exact.tile_states(k.double(), v.double(), log_decay, tiles, reverse=False)
    exact.fold(states, None, log_decay, tiles, reverse=False)
    ends = exact.tile_states(q.double(), do.double(), log_decay, tiles, reverse=True, scale=SCALE)
    exact.fold(ends, None, log_decay, tiles, reverse=True)
    return [q, k, v, do, states.float(), ends.float(), log_decay]


def both(inputs: list[Tensor], tiles: Tiles) -> tuple[Tensor, ...]:
    q, k, v, do, states, ends, g = inputs
    dq, kept = by_head.early_gradients(q, k, v, do, states, g, tiles, scale=SCALE)
    return dq, *by_head.late_gradients(q, k, v, do, states, ends, g, tiles, kept, scale=SCALE)


def right(inputs: list[Tensor], tiles: Tiles) -> tuple[Tensor, ...]:
    q, k, v, do, states, ends = (x.double() for x in inputs[:6])
    options: dict[str, Any] = {"scale": SCALE, "out_dtype": torch.float64}
    g = inputs[6]
    return (
        exact.tile_outputs(do, v, k, states.mT, g, tiles, reverse=False, state_scale=SCALE, **options),
        exact.tile_outputs(v, do, q, ends.mT, g, tiles, reverse=True, state_scale=1.0, **options),
        exact.tile_outputs(k, q, do, ends, g, tiles, reverse=True, state_scale=1.0, **options),
        exact.decay_gradient(q, k, v, do, states, ends, g, tiles, scale=SCALE),
    )


def assert_right(inputs: list[Tensor], tiles: Tiles, found: tuple[Tensor, ...]) -> None:
    """The gradient of log_decay head by head, for those of long memories are far larger."""
    expected = right(inputs, tiles)
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=False):
        assert relative_error(x, y) < 3e-3, name
    for head, decay in enumerate(inputs[6].tolist()):
        assert relative_error(found[3][:, head], expected[3][:, head]) < 2e-3, decay


def tokens_in_pytorch(log_decay: Tensor, tokens: int) -> Tensor:
    return log_decay[None, :, None].expand(1, -1, tokens).contiguous()


def tiles_in_pytorch(x: Tensor, tiles: Tiles) -> Tensor:
    return torch.stack([x[:, :, i : i + n].double().sum(2) for i, n in tiles.spans], 2)


def test_emulated(emulation, monkeypatch):
    """Against fp64, in documents that end anywhere."""
    monkeypatch.setattr(between, "of_tokens", tokens_in_pytorch)
    monkeypatch.setattr(between, "of_tiles", tiles_in_pytorch)
    tiles = Tiles(128, (0, 130, 130, 161))
    inputs = draw("cpu", tiles, (0.0, 0.1, 30.0))
    assert_right(inputs, tiles, both(inputs, tiles))


@pytest.mark.interpreter
@pytest.mark.parametrize("tiles", [Tiles(16, (0, 45)), Tiles(32, (0, 33, 33, 50))])
def test_tokens_and_tiles_interpreted(monkeypatch, tiles):
    monkeypatch.setattr(between, "BLOCK", 16)
    g, x = -torch.rand(3), torch.randn(2, 3, tiles.num_tokens)
    assert torch.equal(between.of_tokens(g, tiles.num_tokens), tokens_in_pytorch(g, tiles.num_tokens))
    whole = between.of_tiles(x, tiles)
    assert torch.allclose(whole, tiles_in_pytorch(x, tiles), rtol=1e-12)
    start, count = tiles.spans[-1]
    alone = between.of_tiles(x[1:, :, start:].contiguous(), Tiles(tiles.size, (0, count)))
    assert torch.equal(alone, whole[1:, :, -1:])


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize(
    "tiles", [Tiles(512, (0, 1300)), Tiles(256, (0, 256, 300, 300, 301, 905)), Tiles(4096, (0, 8192))]
)
def test_against_fp64(tiles):
    inputs = draw("cuda", tiles, DECAYS, batch=2)
    assert_right(inputs, tiles, both(inputs, tiles))


@pytest.mark.gpu
@ON_A_GPU
def test_a_call_uses_them_and_ranks_have_its_bits():
    tokens, tile = 5000, 512
    given = [torch.randn(2, 8, tokens, 128, device="cuda", dtype=BF16) for _ in range(4)]
    log_decay = -torch.tensor(DECAYS, device="cuda")

    def call(own: slice, rows: slice = slice(None), **options: Any) -> list[Tensor]:
        q, k, v, do = (x[rows, :, own] for x in given)
        leaves = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
        o = leetdist.linear_attention(*leaves, tile=tile, **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    learnt = [x.detach().requires_grad_() for x in (*given[:3], log_decay)]
    assert "gradients of k, v and log_decay" in str(leetdist.explain(*learnt, tile=tile))
    whole = call(slice(0, tokens))
    assert all(torch.equal(x, y) for x, y in zip(call(slice(0, tokens)), whole, strict=True))
    one = call(slice(0, tokens), slice(1, 2))
    assert all(torch.equal(x, y[1:]) for x, y in zip(one[:4], whole[:4], strict=True))
    for ranks in (2, 3, 5):
        bounds = [tile * (10 * rank // ranks) for rank in range(ranks)] + [tokens]
        parts = leetdist.virtual_ranks(
            lambda group, bounds=bounds: call(slice(bounds[group.rank], bounds[group.rank + 1]), group=group), ranks
        )
        for x, shards in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(x, torch.cat(shards, 2) if x.ndim == 4 else sum(shards[1:], shards[0]))
