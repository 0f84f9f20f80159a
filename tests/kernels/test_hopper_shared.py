"""The CUDA C++ kernels for heads that share operands, on the CPU, emulated, and on a Hopper GPU."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import ptxas
import pytest
import torch
from emulated import emulated
from test_hopper_cuda import OWN, SHARED_MEMORY
from test_hopper_token import BF16, FP16, FP32, ON_A_GPU, PACKED, decays
from test_two_passes import sums

import leetdist
from leetdist.kernels.common.sums import sum_shared
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper as alone
from leetdist.kernels.constant_decay.cuda import launches
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.token_decay.cuda import hopper, shared, shared_gradients
from leetdist.kernels.token_decay.pytorch import block as exact
from leetdist.reference import relative_error

added_up = pytest.importorskip("leetdist.kernels.token_decay.triton.added_up")
# Bytes a thread may keep in local memory: by NVRTC 13.5, of whose sums nvcc 13.0 spills a little less, 96 at most.
SPILLS = {
    "shared_states": 32,
    "paired_outputs": 64,
    "paired_gradients": 96,
    "summed_outputs": 100,
    "grouped_outputs": 32,
    "flows": 104,
}


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def on_either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(cuda_launch, "multiprocessors", lambda device: 1)  # enough tiles for pairs
    with emulated(1) if request.param == "emulated" else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


device = on_either


def draw(device: str, tiles: Tiles, rows: int, share: int, dtype: torch.dtype, kind: str, batch: int) -> Any:
    """a, b, c, states and log_decay: two groups, whose heads share a and b, (B, N, H, D) in memory."""
    heads, tokens = 2 * share, tiles.num_tokens
    a, b, c = (
        torch.randn(batch, tokens, own, dim).to(device, dtype).transpose(1, 2)
        for own, dim in ((2, rows), (2, rows), (heads, 64))
    )
    states = torch.randn(batch, heads, tiles.count, rows, 64).to(device)
    return a, b, c, states, decays(kind, batch, heads, tokens).to(device)


CASES = [  # rows, share, dtype, reverse, kind, tiles, batch
    (64, 4, BF16, True, "mixed", Tiles(192, (0, 65, 195)), 1),
]
ON_A_GPU_TOO = [
    (rows, share, dtype, reverse, kind, tiles, 3)
    for tiles in (PACKED, Tiles(512, (0, 1300)))
    for rows in (64, 128)
    for share in (2, 8, 6)
    for dtype in (BF16, FP16)
    for reverse in (False, True)
    for kind in ("weak", "usual", "mixed")
]


def test_pairs_have_the_bits_of_single_heads(device):
    """Whatever they are beside, and whatever is not finite in one of them."""
    for rows, share, dtype, reverse, kind, tiles, batch in ON_A_GPU_TOO if device == "cuda" else CASES:
        a, b, c, states, g = draw(device, tiles, rows, share, dtype, kind, batch)
        options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 0.7, "out_dtype": dtype}
        assert shared.in_pairs(a, b, c, g, tiles)
        for bad in (None, (c, 64, math.nan), (b, 10, math.inf), (g, 131, 0.5)):
            if bad is not None:
                x, token, value = bad
                (x[-1, -1, token, 5:6] if x.ndim == 4 else x[-1, -1, token : token + 1]).fill_(value)
            out = hopper.tile_outputs(a, b, c, states, g, tiles, **options)
            expected = alone.tile_outputs(a, b, c, states, g, tiles, **options)
            assert torch.equal(out.nan_to_num(77.0), expected.nan_to_num(77.0)), (
                rows,
                share,
                dtype,
                reverse,
                kind,
                bad,
            )
            assert torch.equal(out.isnan(), expected.isnan())
            assert bad is not None or out.isfinite().all()
            added = hopper.tile_states(b, c, g, tiles, reverse=reverse, scale=0.3)
            expected = alone.tile_states(b, c, g, tiles, reverse=reverse, scale=0.3)
            assert torch.equal(added.nan_to_num(77.0), expected.nan_to_num(77.0)), (
                rows,
                share,
                dtype,
                reverse,
                kind,
                bad,
            )


def gradients_of(
    q: Any, k: Any, v: Any, do: Any, states: Any, ends: Any, g: Any, tiles: Tiles, late: Any = None, **more: Any
) -> Any:
    """What the two passes make, dq and dk not yet added up. late: what the second alone is told."""
    dq, kept = shared_gradients.early_gradients(q, k, v, do, states, g, tiles, scale=0.3, **more)
    more |= late or {}
    return dq, *shared_gradients.late_gradients(q, k, v, do, states, ends, g, tiles, kept, scale=0.3, **more)


def test_what_one_head_of_a_pair_leaves_out(device):
    """Tokens that decay to nothing for one head are read for the other, and change no bit of the first."""
    tiles = Tiles(3000 if device == "cuda" else 1000, (0, 3000 if device == "cuda" else 1000))
    for reverse in (False, True):
        _, b, c, _, g = draw(device, tiles, 64, 4, BF16, "weak", 1)
        g[0, 0] = -0.5
        far = slice(500, None) if reverse else slice(0, tiles.num_tokens - 500)
        c[0, 0, far] = math.nan
        added = hopper.tile_states(b, c, g, tiles, reverse=reverse)
        assert added.isfinite().all()
        assert torch.equal(added, alone.tile_states(b, c, g, tiles, reverse=reverse))


def added_up_in_fp64(*given: Any, scale: float, out: Any, weight: Any) -> torch.Tensor:
    """The gradient of log_decay from what the two passes leave of tokens, (B, H, 2, N), and of tiles."""
    tiles, read, written, across, lost = given[7:]
    assert not any(x.any() for x in lost)
    read, (behind, inside) = read.double().sum(2), written.double().unbind(2)
    total = torch.empty_like(read)
    for tile, (begin, length) in enumerate(tiles.spans):
        passing = across[:, :, tile].double()
        for first in range(begin, begin + length, 64):
            chunk = slice(first, min(first + 64, begin + length))
            a, b = read[:, :, chunk], behind[:, :, chunk]
            passing = passing - a.sum(-1)
            before = torch.nn.functional.pad(b.cumsum(-1)[..., :-1], (1, 0))
            total[:, :, chunk] = inside[:, :, chunk] + a.flip(-1).cumsum(-1).flip(-1) + before + passing[..., None]
            passing = passing + b.sum(-1)
    return total


def all_gradients(q: Any, k: Any, v: Any, do: Any, states: Any, ends: Any, g: Any, tiles: Tiles) -> list[Any]:
    dq, dk, dv, dg = gradients_of(q, k, v, do, states, ends, g, tiles)
    return [sum_shared(dq, q.shape[1], BF16), sum_shared(dk, k.shape[1], BF16), dv, dg]


@pytest.mark.parametrize("kind", ["weak", "usual", "mixed"])
def test_gradients_of_heads_that_share(device, kind, monkeypatch):
    """Against fp64; in a larger batch, and launched again."""
    gpu = device == "cuda"
    if not gpu and kind != "mixed":
        pytest.skip("emulated, one kind")
    if not gpu:
        monkeypatch.setattr(added_up, "added_up", added_up_in_fp64)
    cases = [(128, PACKED, 8), (64, Tiles(512, (0, 1300)), 12), (128, Tiles(512, (0, 1300)), 4)]
    few = Tiles(192, (0, 65, 195))
    for rows, tiles, share in cases if gpu else [(64, few, 4), (128, few, 4), (128, few, 8)]:
        q, k, v, states, g = draw(device, tiles, rows, share, BF16, kind, 3 if gpu else 1)
        given = q, k, v, torch.randn_like(v), states, torch.randn_like(states), g
        found = all_gradients(*given, tiles)
        doubles = [x.double() for x in given]
        q, k, v, do, states, ends, g = doubles
        options: dict[str, Any] = {"scale": 0.3, "out_dtype": torch.float64}
        expected = [
            exact.tile_outputs(do, v, k, states.mT, g, tiles, reverse=False, state_scale=0.3, **options),
            exact.tile_outputs(v, do, q, ends.mT, g, tiles, reverse=True, state_scale=1.0, **options),
            exact.tile_outputs(k, q, do, ends, g, tiles, reverse=True, state_scale=1.0, **options),
            exact.decay_gradient(*doubles, tiles, scale=0.3),
        ]
        expected[:2] = [x.unflatten(1, (2, -1)).sum(2) for x in expected[:2]]
        for name, x, y in zip(("dq", "dk", "dv", "d log_decay"), found, expected, strict=True):
            assert relative_error(x, y) < (1e-4 if name == "d log_decay" else 3e-3), name
        for _ in range(3 if gpu else 0):
            again = all_gradients(*(x[-1:].contiguous() for x in given), tiles)
            assert all(torch.equal(x, y[-1:]) for x, y in zip(again, found, strict=True))


@pytest.mark.parametrize(("rows", "share"), [(64, 4), (128, 4), (128, 8)])
def test_what_the_early_pass_leaves_for_log_decay(device, rows, share):
    """Beside dq with the bits that it has alone: sums of tokens, against fp64, and which heads' tiles are lost."""
    gpu = device == "cuda"
    for kind in ("weak", "usual", "mixed") if gpu else ("mixed",):
        tiles = PACKED if gpu else Tiles(192, (0, 65, 195))
        q, k, v, states, g = draw(device, tiles, rows, share, BF16, kind, 1)
        do, options = torch.randn_like(v), {"reverse": False, "scale": 0.3, "state_scale": 0.3, "out_dtype": FP32}
        dq, kept = shared_gradients.early_gradients(q, k, v, do, states, g, tiles, scale=0.3)
        assert torch.equal(dq, hopper.tile_outputs(do, v, k, states.mT, g, tiles, **options))
        each = [x.repeat_interleave(share, 1).cpu() for x in (q, k)]
        read, written, _ = sums([*each, v.cpu(), do.cpu(), states.cpu(), states.cpu(), g.cpu()], tiles)
        for name, x, y in (("A", kept["read"], read), ("pairs", kept["pairs"][:, :, 1:], written[:, :, 1:])):
            assert relative_error(x.sum(2).cpu(), y.sum(2)) < 1e-4, (name, kind)
        assert not kept["early_lost"].any()
        v[0, -2, 70, 5] = math.inf
        _, bad = shared_gradients.early_gradients(q, k, v, do, states, g, tiles, scale=0.3)
        tile = next(i for i, (begin, length) in enumerate(tiles.spans) if begin <= 70 < begin + length)
        assert bad["early_lost"].nonzero().tolist() == [[0, 2 * share - 2, tile]]
        others = [i for i in range(2 * share) if i != 2 * share - 2]
        assert all(torch.equal(bad[name][:, others, -1], kept[name][:, others, -1]) for name in ("read", "pairs"))


@pytest.mark.gpu
@ON_A_GPU
def test_a_call_of_mamba2s_shape_has_its_bits_on_ranks():
    """Forward and backward, where heads are 64 in 8 groups, and what is not finite stays in its head's group."""
    tokens, tile = 5000, 512
    given = [
        torch.randn(1, heads, tokens, dim, device="cuda", dtype=BF16)
        for heads, dim in ((8, 128), (8, 128), (64, 64), (64, 64))
    ]
    given.append(decays("usual", 1, 64, tokens).cuda() * 0.05)

    def call(own: slice, given: list[torch.Tensor] = given, **more: Any) -> list[torch.Tensor]:
        q, k, v, do, g = (x[:, :, own] for x in given)
        leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
        o = leetdist.linear_attention(*leaves, tile=tile, **more)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    leaves = [x.detach().requires_grad_() for x in (*given[:3], given[4])]
    assert "cuda.shared_gradients" in str(leetdist.explain(*leaves, tile=tile))
    whole = call(slice(0, tokens))
    for _ in range(4):  # launches are repeated
        assert all(torch.equal(x, y) for x, y in zip(call(slice(0, tokens)), whole, strict=True))
    doubles = [x.double().detach().requires_grad_() for x in (*given[:3], given[4])]
    o = leetdist.linear_attention(*doubles, tile=tile)
    for x, y in zip(whole, [o, *torch.autograd.grad(o, doubles, given[3].double())], strict=True):
        assert relative_error(x, y) < 3e-3
    for ranks in (2, 3, 5):
        bounds = [tile * (10 * rank // ranks) for rank in range(ranks)] + [tokens]
        parts = leetdist.virtual_ranks(
            lambda group, bounds=bounds: call(slice(bounds[group.rank], bounds[group.rank + 1]), group=group), ranks
        )
        for x, shards in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(x, torch.cat(shards, 2))
    bad = [x.clone() for x in given]
    bad[2][0, 11, 3000, 7] = math.nan
    for name, x, y in zip(("o", "dq", "dk", "dv", "dg"), call(slice(0, tokens), bad), whole, strict=True):
        share = x.shape[1] // 8  # of the second group's heads, 11 is in
        others = [i for i in range(x.shape[1]) if i not in range(share, 2 * share)]
        assert torch.equal(x[:, others], y[:, others])
        assert x.isfinite().all() == (name == "dv")  # which does not read v


AGAIN = launches.AGAIN
COMPILED = [  # source, step, rows, columns, warpgroups, outputs in fp32, reversed, blocks to a cluster
    ("shared_states", "tile_states", 128, 64, 4, False, True, None),
    ("paired_outputs", "tile_outputs", 128, 64, 1, False, False, None),
    ("paired_outputs", "tile_outputs", 128, 64, 1, False, True, None),
    ("paired_outputs", AGAIN, 128, 64, 1, False, False, None),
    ("paired_gradients", "tile_outputs", 64, 64, 2, False, False, None),
    ("paired_gradients", "tile_outputs", 128, 64, 2, False, True, None),
    ("paired_gradients", AGAIN, 128, 64, 2, False, True, None),
    ("summed_outputs", "tile_outputs", 64, 128, 1, True, True, None),
    ("summed_outputs", AGAIN, 64, 128, 1, True, True, None),
    ("grouped_outputs", "tile_outputs", 64, 64, 2, False, True, 2),
    ("grouped_outputs", "flows", 64, 64, 2, False, False, 2),
    ("grouped_outputs", "flows", 64, 64, 2, False, False, 1),
    ("grouped_outputs", "flows", 64, 64, 2, True, False, 1),
    ("grouped_outputs", "flows", 64, 64, 2, True, False, 2),
    ("grouped_outputs", "tile_outputs", 64, 64, 2, True, False, 1),
    ("grouped_outputs", AGAIN, 64, 64, 2, False, False, 2),
]


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize("weighted", [False, True, "and skipped"])
@pytest.mark.parametrize(("source", "name", "rows", "columns", "groups", "wide", "reverse", "cluster"), COMPILED)
def test_compiles_and_fits(source, name, rows, columns, groups, wide, reverse, cluster, weighted):
    weighted, skipped = bool(weighted), weighted == "and skipped"
    if skipped and (source != "paired_outputs" or reverse):
        pytest.skip("o alone")
    made = launches.defines(name, rows, columns, groups, BF16, wide, reverse, True)
    made += shared.WEIGHTED * weighted + shared.SKIPPED * skipped
    made = made if cluster is None else (*made, ("CLUSTER", cluster))
    made += shared.FLOWS * (name == "flows")
    said = ptxas.report(f"token_decay/cuda/{source}.cu", "sm_90a", made)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert name == AGAIN or int(spilled[1]) <= SPILLS[name if name == "flows" else source] + 16 * weighted, said
    assert "serialized" not in said, said
    blocks = 1 if name == AGAIN or groups > 1 else 2
    if source == "paired_gradients":
        asked = shared_gradients.shared_memory(name, rows, reverse, weighted)
    else:
        asked = shared.shared_memory(source, name, rows, columns, weighted, skipped)
    assert blocks * (asked + OWN) <= SHARED_MEMORY


SUMS = [(4, 64, 2, 2), (6, 128, 6, 2), (12, 128, 4, 4), (64, 128, 8, 8), (32, 128, 16, 8), (24, 128, 12, 4)]


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("summed", ["pairs", "clusters"])
def test_heads_that_share_are_added_up(device, forward, summed):
    """Against fp64, in a larger batch, launched again, and with something bad in one head of one batch entry."""
    gpu = device == "cuda"
    reverse = not forward
    if not gpu and forward is (summed == "pairs"):
        pytest.skip("emulated, one direction each")
    cases = SUMS if gpu else [(2, 64, 2, 2)] if summed == "pairs" else [(8, 128, 8, 8)]
    tiles, batch = (PACKED, 3) if gpu else (Tiles(128, (0, 65, 195)), 1)
    for heads, columns, share, together in cases:
        if gpu and (together == 2) != (summed == "pairs"):
            continue
        a, b, c = (
            torch.randn(batch, tiles.num_tokens, own, dim).to(device, BF16).transpose(1, 2)
            for own, dim in ((heads, 64), (heads, 64), (heads // share, columns))
        )
        states = torch.randn(batch, heads, tiles.count, 64, columns).to(device)
        g = decays("mixed", batch, heads, tiles.num_tokens).to(device)
        options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 0.7}
        out = hopper.tile_outputs(a, b, c, states, g, tiles, out_dtype=FP32, **options)
        doubles = a.double(), b.double(), c.double(), states.double(), g.double()
        expected = exact.tile_outputs(*doubles, tiles, out_dtype=torch.float64, **options)
        expected = expected.unflatten(1, (-1, together)).sum(2)
        assert out.shape == expected.shape
        assert out.dtype == (BF16 if together == share > 2 else FP32)
        assert heads == 2 or out.stride(1) <= out.stride(2)  # laid out as a is
        for head in range(heads // together):
            assert relative_error(out[:, head], expected[:, head]) < 3e-3
        last = [x[-1:].contiguous() for x in (a, b, c, states, g)]
        for _ in range(10 if gpu else 1):
            assert torch.equal(hopper.tile_outputs(*last, tiles, out_dtype=FP32, **options), out[-1:])
        for operand, token in (("b", 64), ("c", 150), ("b", 10), ("c", 131))[: 4 if gpu else 2]:
            bad = [x.clone() for x in last]
            bad["abc".index(operand)][0, -1, token, 5] = random.choice((math.nan, math.inf))
            begin, length = next(span for span in tiles.spans if sum(span) > token)
            seen = slice(begin, token + 1) if reverse else slice(token, begin + length)
            lost = torch.zeros_like(out[-1:], dtype=torch.bool)
            if operand == "b":
                lost[:, -1, seen] = True
            else:
                lost[:, -(share // together) :, seen, 5] = True
            found = hopper.tile_outputs(*bad, tiles, out_dtype=FP32, **options)
            assert torch.equal(found[~lost], out[-1:][~lost])
            assert not found[lost].isfinite().any()
