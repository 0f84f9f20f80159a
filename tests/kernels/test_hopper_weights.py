"""v and its weights, and Mamba-2's D, in the CUDA C++ kernels for heads that share operands, on the CPU, emulated, and
on a Hopper GPU."""

from __future__ import annotations

import math
import re
from typing import Any

import ptxas
import pytest
import torch
from emulated import emulated
from test_hopper_shared import added_up, draw, gradients_of, on_either
from test_hopper_token import BF16, ON_A_GPU, PACKED

import leetdist
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.token_decay.cuda import hopper, weights
from leetdist.kernels.token_decay.pytorch import block as exact
from leetdist.reference import relative_error

device = on_either
WEIGHTED_CASES = [(rows, tiles, 3) for tiles in (PACKED, Tiles(512, (0, 1300))) for rows in (64, 128)]


def test_weights_have_the_bits_of_the_product(device, monkeypatch):
    """v and its weights, or their product: forward, in all gradients, and where some are not numbers."""
    gpu = device == "cuda"
    if not gpu:  # what it adds up, as it is
        monkeypatch.setattr(added_up, "added_up", lambda *given, **_: torch.cat(given[8:10], 2))
    for rows, tiles, batch in WEIGHTED_CASES if gpu else [(rows, Tiles(128, (0, 66, 70)), 1) for rows in (64, 128)]:
        q, k, x, states, g = draw(device, tiles, rows, 4, BF16, "mixed", batch)
        do, ends = torch.randn_like(x), torch.randn_like(states)
        w = torch.rand(g.shape, device=device)
        options: dict[str, Any] = {"reverse": False, "scale": 0.5, "state_scale": 0.7, "out_dtype": BF16}
        for bad in (False, True):
            if bad:
                x[-1, -1, 68, 5], w[-1, 0, 3] = math.nan, math.inf
            v = exact.weighted_values(x, w)
            found, wanted = (
                (
                    hopper.tile_states(k, y, g, tiles, reverse=False, **more),
                    hopper.tile_outputs(q, k, y, states, g, tiles, **options, **more),
                    *gradients_of(q, k, y, do, states, ends, g, tiles, **more),
                )
                for y, more in ((x, {"weight": w}), (v, {}))
            )
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))
                assert torch.equal(one.isnan(), other.isnan())
            # (What decays to nothing within a tile is in none of the states.)
            assert all(bool(one.isfinite().all()) != bad for one in found[1:3])


def test_short_calls_write_no_product_either(monkeypatch):
    """Where heads by themselves, which want the product, would leave fewer multiprocessors with nothing to do."""
    tiles = Tiles(128, (0, 70))
    with emulated(132):
        q, k, x, states, g = draw("cpu", tiles, 64, 4, BF16, "mixed", 1)
        w = torch.rand(g.shape)
        options: dict[str, Any] = {"reverse": False, "scale": 0.5, "state_scale": 0.7, "out_dtype": BF16}
        v = exact.weighted_values(x, w)
        wanted = (
            hopper.tile_states(k, v, g, tiles, reverse=False),
            hopper.tile_outputs(q, k, v, states, g, tiles, **options),
        )
        monkeypatch.setattr(hopper, "weighted", lambda v, weight: pytest.fail("dt x is written"))
        found = (
            hopper.tile_states(k, x, g, tiles, reverse=False, weight=w),
            hopper.tile_outputs(q, k, x, states, g, tiles, weight=w, **options),
        )
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_skipped_outputs_have_the_bits_of_two_steps(device):
    """o rounded, and then D x added to it: D a number a head or column, chunks that are full or not, and where some are
    not numbers, the second walk too."""
    gpu = device == "cuda"
    for rows, tiles, batch in WEIGHTED_CASES if gpu else [(rows, Tiles(128, (0, 66, 194)), 1) for rows in (64, 128)]:
        q, k, x, states, g = draw(device, tiles, rows, 4, BF16, "mixed", batch)
        w = torch.rand(g.shape, device=device)
        options: dict[str, Any] = {"reverse": False, "scale": 0.5, "state_scale": 0.7, "out_dtype": BF16}
        for bad in (None, math.inf, math.nan):
            if bad is not None:
                x[-1, -1, 68, 5], x[-1, 0, 3, 60] = bad, -bad
            o = hopper.tile_outputs(q, k, x, states, g, tiles, weight=w, **options)
            for columns in ((), (64,)):
                wide = torch.randn(x.shape[1], *columns, device=device)
                found = hopper.tile_outputs(q, k, x, states, g, tiles, weight=w, skip=wide, **options)
                wanted = skipped(o, x, wide)
                assert torch.equal(found.nan_to_num(77.0), wanted.nan_to_num(77.0)), (rows, columns, bad)
                assert torch.equal(found.isnan(), wanted.isnan())
                assert bool(found.isfinite().all()) == (bad is None)
                assert not torch.equal(found, o)


def skipped(o: torch.Tensor, x: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """o + D x in fp32, then rounded: on a GPU by the pass that the kernel stands in for. fp64 holds the sum."""
    if o.is_cuda:
        from leetdist.kernels.mamba.triton import scan

        return scan.scan_outputs(o.transpose(1, 2), x.transpose(1, 2), D, None).transpose(1, 2)
    by = D.view(D.shape[0], 1, -1).double()
    return (o.double() + by * x.double()).float().to(o.dtype)


@pytest.mark.parametrize("bad", ["", "x", "do", "k"])
def test_gradients_of_v_itself(device, bad, monkeypatch):
    """With a weight, and a number a head times v in the outputs: the bits of a pass over dv, and sums of tokens."""
    gpu = device == "cuda"
    if not gpu:
        monkeypatch.setattr(added_up, "added_up", lambda *given, **_: torch.cat(given[8:10], 2))
    for rows, tiles, batch in WEIGHTED_CASES if gpu else [(64, Tiles(128, (0, 66, 266)), 1)]:
        q, k, x, states, g = draw(device, tiles, rows, 4, BF16, "mixed", batch)
        do, ends = torch.randn_like(x), torch.randn_like(states)
        w, skip = torch.rand(g.shape, device=device), torch.randn(g.shape[1], device=device)
        if bad:
            {"x": x, "do": do, "k": k}[bad][-1, 1, 131 if bad == "k" else 40, 5] = math.inf
        v, given = exact.weighted_values(x, w), (do, states, ends, g, tiles)
        dq, dk, dv, dg = gradients_of(q, k, v, *given)
        for more in ({}, {"skip": skip}):
            outs: Any = (None,) * (4 + len(more))
            found = gradients_of(q, k, x, *given, {"outs": outs, **more}, weight=w)
            for one, other in zip(found, (dq, dk, finished(dv, w, do, more.get("skip")), dg), strict=False):
                assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))
                assert torch.equal(one.isnan(), other.isnan())
            assert len(found) == 5 + len(more)
            for sums, of in zip(found[4:], (dv, do), strict=False):
                wanted, finite = (of.double() * x.double()).sum(3), sums.isfinite()
                assert relative_error(sums[finite], wanted[finite]) < 3e-7
                assert torch.equal(finite, wanted.isfinite())
                assert bool(finite.all()) == (not bad or (of is do and bad == "k"))
            if bad:
                continue
            outs = None, *(torch.full_like(y, 7.0) if i != 1 else None for i, y in enumerate(found[2:]))  # given places
            gradients_of(q, k, x, *given, {"outs": outs, **more}, weight=w)
            assert all(y is None or torch.equal(y, z) for y, z in zip(outs, found[1:], strict=True))


def finished(dv: torch.Tensor, w: torch.Tensor, do: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """What v gets by dv, which is that of v times w, and by skip v in the outputs, rounded as by Triton's pass."""
    added = 0.0 if skip is None else (do.float() * skip[:, None, None]).double()
    return (dv.double() * w[..., None].double() + added).float().to(dv.dtype)


@pytest.mark.gpu
@ON_A_GPU
def test_a_scan_of_mamba2s_shape_writes_no_dt_x():
    """Bits of ranks, and of the product where it is written; and the memory that is held beside inputs and results."""
    tokens, tile = 5000, 512
    x, dy = (torch.randn(1, tokens, 64, 64, device="cuda", dtype=BF16) for _ in range(2))
    B, C = (torch.randn(1, tokens, 8, 128, device="cuda", dtype=BF16) for _ in range(2))
    dt, A, D = torch.rand(1, tokens, 64, device="cuda") * 0.1, -torch.rand(64, device="cuda"), torch.randn(64).cuda()

    def call(own: slice, **more: Any) -> list[torch.Tensor]:
        leaves = [y[:, own].detach().requires_grad_() for y in (x, dt, B, C)]
        y = leetdist.mamba_chunk_scan_combined(*leaves[:2], A, *leaves[2:], D=D, tile=tile, **more)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[:, own])]

    learnt = [y.transpose(1, 2) for y in (C, B, x, (dt * A).requires_grad_())]
    assert re.search(r"D x without z by CUDA C.*\(cuda.weights\)", leetdist.explain(*learnt, tile=tile))
    whole = call(slice(0, tokens))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = call(slice(0, tokens))
    held = torch.cuda.max_memory_allocated() - before - sum(y.nbytes for y in again)
    states = 2 * math.ceil(tokens / tile) * 64 * 128 * 64 * 4  # and their gradients
    assert held < states + x.nbytes // 2  # with numbers a token, neither dt x nor its gradient, nor outputs without D x
    assert all(torch.equal(y, z) for y, z in zip(again, whole, strict=True))
    for ranks in (2, 5):
        bounds = [tile * (10 * rank // ranks) for rank in range(ranks)] + [tokens]
        parts = leetdist.virtual_ranks(
            lambda group, bounds=bounds: call(slice(bounds[group.rank], bounds[group.rank + 1]), group=group), ranks
        )
        for y, shards in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(y, torch.cat(shards, 1))
    leaves = [y.transpose(1, 2).detach().requires_grad_() for y in (C, B, (x * dt[..., None]).to(BF16), dt * A)]
    y = leetdist.linear_attention(*leaves, tile=tile)
    assert torch.equal(skipped(y.detach(), x.transpose(1, 2), D).transpose(1, 2), whole[0])
    dq, dk = torch.autograd.grad(y, leaves, dy.transpose(1, 2))[:2]
    assert torch.equal(dk.transpose(1, 2), whole[3])
    assert torch.equal(dq.transpose(1, 2), whole[4])


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize(
    ("rows", "share", "reverse", "programs"),
    [(128, 8, False, 65536), (64, 4, False, 65536), (128, 8, True, 65536), (64, 12, True, 65536), (128, 8, False, 64)],
)
def test_all_that_a_pass_with_weights_asks_for_compiles(rows, share, reverse, programs):
    asked: set[Any] = set()
    with emulated(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_launch, "kernel", lambda source, name, device, made, **_: asked.add((source, made)))
        kind = BF16, False, reverse, programs, torch.device("cpu")
        weights.compile_for("weighted_values", rows, 64, *kind, share=share)
        if not reverse:
            weights.compile_for("skipped_outputs", rows, 64, *kind, share=share)
    added = "grouped_outputs" if rows == 128 else "summed_outputs"
    sources = {"paired_gradients", added} if reverse else {"shared_states", "paired_outputs"}
    assert {source for source, _ in asked} == {f"token_decay/cuda/{source}.cu" for source in sources}
    for source, made in asked:
        assert ("WEIGHTED", 1) in made
        ptxas.report(source, "sm_90a", made)
