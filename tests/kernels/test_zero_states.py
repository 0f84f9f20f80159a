"""States of zeros that take no memory (kernels/common/memory.py): whoever reads them has the bits of zeros in memory,
and leaves other tiles' results where they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from emulated import emulated
from torch import Tensor

from leetdist.kernels.common.memory import are_zeros, zero_states
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as constant
from leetdist.kernels.token_decay.cuda import gradients, shared_gradients
from leetdist.kernels.token_decay.pytorch import block as by_token

SCALE = 0.3
TILES = Tiles(128, (0, 70, 140, 150), (0, 2))  # without the middle


def drawn(dtype: torch.dtype, heads: int, rows: int, columns: int, *, shared: int = 1) -> dict[str, Tensor]:
    own = heads // shared
    dims = {"q": (own, rows), "k": (own, rows), "v": (heads, columns), "do": (heads, columns)}
    return {
        name: torch.randn(1, TILES.num_tokens, count, dim).to(dtype).transpose(1, 2)
        for name, (count, dim) in dims.items()
    }


def kinds_of_zeros(heads: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    shape = 1, heads, TILES.count, rows, columns
    none = zero_states(shape, torch.float32, torch.device("cpu"))
    assert none.shape == shape
    assert none.untyped_storage().nbytes() == rows * columns * 4
    return none, torch.zeros(shape)


def test_they_are_known() -> None:
    none, zeros = kinds_of_zeros(2, 16, 8)
    assert are_zeros(none)
    assert are_zeros(none.mT)
    assert not are_zeros(zeros)
    assert not none.any()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("gates", [False, True])
def test_the_gradient_of_a_decay(gates: bool, backend: str) -> None:
    heads, dim = 2, 16
    kernels: Any = by_token if gates else constant
    if backend == "triton":
        kernels = pytest.importorskip(f"leetdist.kernels.{'token' if gates else 'constant'}_decay.triton.block")
    x = drawn(torch.float16 if backend == "triton" else torch.float32, heads, dim, dim)
    decay = -torch.rand(1, heads, TILES.num_tokens) if gates else -torch.rand(heads)
    found = []
    for states in kinds_of_zeros(heads, dim, dim):
        out = torch.full_like(decay, math.inf)
        into = {"out": out} if gates else {}
        found.append(kernels.decay_gradient(*x.values(), states, states, decay, TILES, scale=SCALE, **into))
        if gates:
            assert found[-1] is out
            assert out[:, :, 70:140].isinf().all()
            assert out[:, :, :70].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize(("shared", "rows"), [(1, 128), (4, 64), (4, 128)])
def test_the_two_passes_of_hopper(shared: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both leave for log_decay is kept, and nothing added up."""
    added_up = pytest.importorskip("leetdist.kernels.token_decay.triton.added_up")
    heads, columns = (4, 64) if shared > 1 else (1, 128)
    module: Any = shared_gradients if shared > 1 else gradients
    x, decay = drawn(torch.bfloat16, heads, rows, columns, shared=shared), -torch.rand(1, heads, TILES.num_tokens)
    left: list[Tensor] = []
    monkeypatch.setattr(added_up, "added_up", lambda *given, **_: left.extend(given[8:11]) or torch.empty(0))
    found = []
    with emulated():
        gradients._kernel.cache_clear()
        for states in kinds_of_zeros(heads, rows, columns):
            left.clear()
            dq, kept = module.early_gradients(*x.values(), states, decay, TILES, scale=SCALE)
            grads = module.late_gradients(*x.values(), states, states, decay, TILES, kept, scale=SCALE)
            tokens = [y[:, :, [*range(70), *range(140, 150)]] for y in (dq, *grads[:2])]
            found.append([*tokens, *(y.nan_to_num(0.0) for y in left)])
        gradients._kernel.cache_clear()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert all(y.any() for y in found[0][:4])
