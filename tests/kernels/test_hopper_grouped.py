"""Outputs for Hopper that are added up over heads where they are made (kernels/constant_decay/cuda/summed_outputs.cu):
the sums of what single heads have, bit for bit; compiled, on the CPU, emulated, and on a Hopper GPU."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import ptxas
import pytest
import torch
from emulated import emulated
from test_hopper_cuda import OWN, SHARED_MEMORY, SPILLS
from torch import Tensor

import leetdist
from leetdist.kernels.common.memory import zero_states
from leetdist.kernels.common.sums import sum_shared
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import grouped, hopper, launches
from leetdist.kernels.token_decay.cuda import hopper as token

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_A_GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with emulated() if request.param == "emulated" else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


def draw(device: str, tiles: Tiles, heads: int, shared: int, dtype: torch.dtype, batch: int = 1) -> tuple[Any, ...]:
    """a, b, c, states and log_decay; `shared`: heads of a."""
    a, b, c = (
        torch.randn(batch, tiles.num_tokens, own, 128).to(device, dtype).transpose(1, 2)
        for own in (shared, heads, heads)
    )
    states = torch.randn(batch, heads, tiles.count, 128, 128).to(device)
    return a, b, c, states, -torch.rand(heads).to(device) / 10


def added(each: Tensor, together: int, dtype: torch.dtype) -> Tensor:
    """Pairs, and pairs of pairs."""
    parts = each.unflatten(1, (-1, together)).unbind(2)
    total = parts[0] + parts[1]
    return (total + (parts[2] + parts[3]) if together == 4 else total).to(dtype)


CASES = [  # heads, shared, wanted, how many are added up, dtype, reverse, tiles
    ("cpu", 4, 1, 1, 4, BF16, True, Tiles(256, (0, 140, 150))),
    ("cpu", 2, 1, 1, 2, FP16, False, Tiles(128, (0, 70))),
    *(
        pytest.param("cuda", *heads, dtype, reverse, tiles, marks=[pytest.mark.gpu, ON_A_GPU])
        for heads in ((8, 2, 2, 4), (32, 1, 1, 4), (12, 2, 6, 2), (8, 2, 4, 2))
        for dtype in (BF16, FP16)
        for reverse in (False, True)
        for tiles in (Tiles(512, (0, 1300)), Tiles(256, (0, 256, 300, 300, 301, 905)))
    ),
]


# One by one, for each compiles kernels of its own: a minute and more together, the first time.
@pytest.mark.parametrize(("device", "heads", "shared", "wanted", "together", "dtype", "reverse", "tiles"), CASES)
def test_they_are_the_sums_of_single_heads(device, heads, shared, wanted, together, dtype, reverse, tiles):
    """Whatever they are beside, and whatever is not finite in one of them."""
    with emulated() if device == "cpu" else nullcontext():
        check_sums(device, heads, shared, wanted, together, dtype, reverse, tiles)


def check_sums(device, heads, shared, wanted, together, dtype, reverse, tiles):
    a, b, c, states, g = draw(device, tiles, heads, shared, dtype)
    options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 0.7, "out_dtype": FP32}
    assert grouped.added_up(a, c, g, wanted, FP32) == together
    for bad in (False, True):
        if bad:
            b[0, -1, 10, 5], c[0, 0, 65, 5] = math.inf, math.nan
        found = grouped.tile_outputs(a, b, c, states, g, tiles, heads=wanted, **options)
        each = hopper.tile_outputs(a, b, c, states, g, tiles, **options)
        assert found.dtype == (dtype if together == heads // wanted == 4 else FP32)
        expected = added(each, together, found.dtype)
        assert torch.equal(found.nan_to_num(77.0), expected.nan_to_num(77.0)), (tiles, bad)
        assert found.isfinite().all() == (not bad)
    assert torch.equal(sum_shared(found, wanted, dtype).isnan(), sum_shared(each, wanted, dtype).isnan())


def test_two_kinds_of_tiles_have_one_place(device):
    """Tiles that start from a state, and those that do not, of which the second are written beside the first."""
    bounds = (0, 130, 150)
    linked, alone = Tiles(128, bounds, (0,)), Tiles(128, bounds, (1,))
    a, b, c, states, g = draw(device, Tiles(128, bounds), 4, 1, BF16)
    options: dict[str, Any] = {"reverse": True, "scale": 0.5, "state_scale": 0.7, "out_dtype": FP32, "heads": 1}
    zeros = zero_states((1, 4, 1, 128, 128), FP32, states.device)
    found = grouped.tile_outputs(a, b, c, states[:, :, :2].contiguous(), g, linked, **options)
    assert grouped.tile_outputs(a, b, c, zeros, g, alone, out=found, **options) is found
    states[:, :, 2] = 0.0
    assert torch.equal(found, grouped.tile_outputs(a, b, c, states, g, Tiles(128, bounds), **options))


def test_what_is_added_up_depends_on_numbers_of_heads_alone() -> None:
    x, g = torch.empty(1, 8, 5, 128, dtype=BF16), torch.zeros(32)
    assert [grouped.added_up(x[:, :n], x, g, m, FP32) for n, m in ((8, 8), (1, 1), (8, 16), (8, 2))] == [4, 4, 2, 4]
    assert grouped.added_up(x, x, g, None, FP32) == 1  # nobody wants a sum
    assert grouped.added_up(x, x, g, 8, BF16) == 1
    assert grouped.added_up(x, x[..., :64], g, 8, FP32) == 1
    assert grouped.added_up(x, x, torch.zeros(24), 8, FP32) == 1


def test_a_decay_a_token_adds_up_within_the_heads_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """dq of 4 heads of q, whose k has 2: what shares k is more than what shares q, and was added up all the same."""
    monkeypatch.setattr(token.shared, "summed_outputs", lambda *given, **options: "added up")
    monkeypatch.setattr(hopper, "tile_outputs", lambda *given, **options: "each by itself")
    a, b, c = (torch.empty(1, heads, 5, 64, dtype=BF16) for heads in (16, 16, 2))
    given = a, b, c, torch.empty(1, 16, 1, 64, 64), torch.zeros(1, 16, 5), Tiles(128, (0, 5))
    options: dict[str, Any] = {"reverse": False, "scale": 1.0, "state_scale": 1.0, "out_dtype": FP32}
    found = [token.tile_outputs(*given, heads=wanted, **options) for wanted in (None, 2, 1, 4)]
    assert found == ["added up", "added up", "added up", "each by itself"]


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize("name", launches.OUTPUTS)
@pytest.mark.parametrize(("cluster", "wide"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_compiles_and_fits(dtype, cluster, wide, name):
    defines = grouped.defines(name, cluster, dtype, wide, True)
    said = ptxas.report("constant_decay/cuda/summed_outputs.cu", "sm_90a", defines)
    assert grouped.shared_memory(name, cluster) + OWN <= SHARED_MEMORY
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert name == launches.AGAIN or int(spilled[1]) <= SPILLS[False], said
    assert "serialized" not in said, said


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("shared", [8, 4, 1])
def test_ranks_have_the_bits_of_a_call(shared):
    tokens, tile = 5000, 512
    q, do = (torch.randn(2, 16, tokens, 128, device="cuda", dtype=BF16) for _ in range(2))
    k, v = (torch.randn(2, shared, tokens, 128, device="cuda", dtype=BF16) for _ in range(2))
    log_decay = -torch.rand(16, device="cuda") / 50

    def call(own: slice, rows: slice = slice(None), **options: Any) -> list[Tensor]:
        leaves = [x[rows, :, own].detach().requires_grad_() for x in (q, k, v)]
        o = leetdist.linear_attention(*leaves, log_decay, tile=tile, **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, do[rows, :, own])]

    whole = call(slice(0, tokens))
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(call(slice(0, tokens)), whole, strict=True))
    one = call(slice(0, tokens), slice(1, 2))
    assert all(torch.equal(x, y[1:]) for x, y in zip(one, whole, strict=True))
    for ranks in (2, 3, 5):
        bounds = [tile * (10 * rank // ranks) for rank in range(ranks)] + [tokens]
        parts = leetdist.virtual_ranks(
            lambda group, bounds=bounds: call(slice(bounds[group.rank], bounds[group.rank + 1]), group=group), ranks
        )
        for x, shards in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(x, torch.cat(shards, 2))
