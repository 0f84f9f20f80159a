"""A decay a token in Triton, step by step: against the recurrence in fp64, and bit for bit where the contract says."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from test_bad_tokens import assert_seen_only_behind

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.runtime import replay
from leetdist.kernels.token_decay.pytorch import block as plain
from leetdist.reference import recurrence, relative_error

constant = pytest.importorskip("leetdist.kernels.constant_decay.triton.block")
triton_block = pytest.importorskip("leetdist.kernels.token_decay.triton.block")
decode = pytest.importorskip("leetdist.kernels.token_decay.triton.decode")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 2.7e-3}
GRADIENT = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 2e-3}  # of log_decay


def on_both(test):
    """On a GPU, or interpreted."""
    return pytest.mark.gpu(pytest.mark.interpreter(test))


def decays(kind: str, heads: int, tokens: int, batch: int = 1) -> torch.Tensor:
    g = -torch.rand(batch, heads, tokens)
    if kind == "none":
        g = torch.zeros_like(g)
    elif kind == "weak":
        g *= 1e-6
    elif kind == "strong":
        g = g * 10 - 5
    elif kind == "mixed":  # where a difference of fp32 sums would have no digit of the weak ones left
        g *= 1e-3
        g[..., tokens // 3 : tokens // 2] = -50
        g[..., 5::9] = -50
    elif kind == "new starts":
        g *= 0.1
        g[..., [1, tokens // 2]] = -math.inf
    else:
        g *= 0.1
    return g.to(DEVICE)


def draw(tiles, dk, dv, heads=2, dtype=torch.float32, batch=1, q_heads=None, k_heads=None, v_heads=None):
    """q, k, v, do, initial state, gradient of the final one."""

    def tokens(own, dim):
        return torch.randn(batch, own or heads, tiles.num_tokens, dim).to(DEVICE, dtype)

    shape = batch * tiles.num_segments, heads, dk, dv
    return (
        tokens(q_heads, dk), tokens(k_heads, dk), tokens(v_heads, dv), tokens(heads, dv),
        torch.randn(shape).to(DEVICE), torch.randn(shape).to(DEVICE),
    )  # fmt: skip


def both_passes(kernels, q, k, v, do, initial, dfinal, g, tiles, scale=0.5):
    """All that the operator computes, of heads that share an input one by one; the gradient of log_decay last."""
    keep = kernels.transitions(g, tiles)
    states = kernels.tile_states(k, v, g, tiles, reverse=False)
    final = kernels.fold(states, initial, keep, tiles, reverse=False)
    forward = {"reverse": False, "scale": scale, "state_scale": scale}
    o = kernels.tile_outputs(q, k, v, states, g, tiles, out_dtype=q.dtype, **forward)
    ends = kernels.tile_states(q, do, g, tiles, reverse=True, scale=scale)
    dinitial = kernels.fold(ends, dfinal, keep, tiles, reverse=True)
    dq = kernels.tile_outputs(do, v, k, states.mT, g, tiles, out_dtype=q.dtype, **forward)
    reverse = {"reverse": True, "scale": scale, "state_scale": 1.0, "out_dtype": q.dtype}
    dk = kernels.tile_outputs(v, do, q, ends.mT, g, tiles, **reverse)
    dv = kernels.tile_outputs(k, q, do, ends, g, tiles, **reverse)
    dg = kernels.decay_gradient(q, k, v, do, states, ends, g, tiles, scale=scale)
    return {"o": o, "final": final, "dq": dq, "dk": dk, "dv": dv, "dinitial": dinitial, "dg": dg}


def oracle(q, k, v, do, initial, dfinal, g, tiles, scale=0.5):
    """The same by the recurrence in fp64 and autograd, with a copy of what is shared for each head."""
    heads = g.shape[1]
    q, k, v = (x.double().repeat_interleave(heads // x.shape[1], 1).requires_grad_() for x in (q, k, v))
    g, initial = g.double().requires_grad_(), initial.double().requires_grad_()
    o, final = [], []
    for row, (begin, end) in enumerate(pairwise(tiles.bounds)):
        rows = slice(None) if tiles.regular else slice(row, row + 1)
        if begin == end:
            final.append(initial[rows])
            continue
        own = (x[:, :, begin:end] for x in (q, k, v, g))
        outputs, state = recurrence(*own, scale=scale, initial_state=initial[rows])
        o.append(outputs)
        final.append(state)
    o, final = torch.cat(o, 2), torch.cat(final)
    names = "dq", "dk", "dv", "dinitial", "dg"
    grads = torch.autograd.grad([o, final], (q, k, v, initial, g), [do.double(), dfinal.double()])
    return {"o": o.detach(), "final": final.detach(), **dict(zip(names, grads, strict=True))}


def assert_right(inputs, g, tiles):
    found, exact = both_passes(triton_block, *inputs, g, tiles), oracle(*inputs, g, tiles)
    dtype = inputs[0].dtype
    bounds = {name: ROUNDING[dtype] for name in found} | {"dg": GRADIENT[dtype], "final": 1e-6, "dinitial": 2e-6}
    if dtype != torch.float32:
        bounds |= {"final": 1e-5, "dinitial": 1e-5}  # weighted tokens are the sum of two 16-bit numbers
    for name, x in found.items():
        assert relative_error(x, exact[name]) <= bounds[name], name


@on_both
@pytest.mark.parametrize("kind", ["usual", "weak", "strong", "mixed", "new starts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_passes(kind, dtype):
    tiles = Tiles(128, (0, 150))
    assert_right(draw(tiles, 16, 16, heads=1, dtype=dtype), decays(kind, 1, 150), tiles)


@on_both
@pytest.mark.parametrize(
    ("tiles", "dk", "dv", "shared"),
    [
        (Tiles(64, (0, 40, 40, 110)), 32, 16, {"q_heads": 1, "k_heads": 1}),  # as Mamba-2 shares
        (Tiles(16, (0, 40)), 24, 80, {"v_heads": 1, "batch": 2}),  # columns in two turns, chunks of a tile
        (Tiles(128, (0, 70)), 128, 16, {"q_heads": 1}),  # chunks shorter than sums
    ],
)
def test_shapes(tiles, dk, dv, shared):
    inputs = draw(tiles, dk, dv, **shared)
    assert_right(inputs, decays("mixed", 2, tiles.num_tokens, shared.get("batch", 1)), tiles)


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_decay_gives_the_bits_of_a_constant_decay_of_none(dtype):
    tiles = Tiles(128, (0, 40, 190))
    q, k, v, _, initial, _ = draw(tiles, 16, 32, heads=1, dtype=dtype)
    found = []
    for kernels, g in ((triton_block, decays("none", 1, 190)), (constant, torch.zeros(1, device=DEVICE))):
        keep = triton_block.transitions(g, tiles) if kernels is triton_block else g
        for reverse in (False, True):
            states = kernels.tile_states(k, v, g, tiles, reverse=reverse)
            final = kernels.fold(states, initial, keep, tiles, reverse=reverse)
            options = {"reverse": reverse, "scale": 0.5, "state_scale": 1.0, "out_dtype": dtype}
            found += [states, final, kernels.tile_outputs(q, k, v, states, g, tiles, **options)]
    for ours, theirs in zip(found[:6], found[6:], strict=True):
        assert torch.equal(ours, theirs)


@on_both
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 100), (torch.float16, 150)])
def test_bits_are_those_of_a_document_alone(dtype, tokens):
    """In a packed row, beside another batch entry, and with decays of any strides."""
    bounds = 0, 20, tokens
    tiles = Tiles(128, bounds)
    inputs = draw(tiles, 16, 16, dtype=dtype)
    g = decays("usual", 2, tokens)
    wide = torch.stack((g, g), -1)[..., 0]
    assert not wide.is_contiguous()
    together = both_passes(triton_block, *inputs, wide, tiles)
    for row, (begin, end) in enumerate(pairwise(bounds)):
        tokens = [x[:, :, begin:end] for x in (*inputs[:4], g)]
        states = [x[row : row + 1] for x in inputs[4:]]
        own = tokens[:4] + states + tokens[4:]
        twice = both_passes(triton_block, *(torch.cat((x, x)) for x in own), Tiles(128, (0, end - begin)))
        for name, x in twice.items():
            there = together[name]
            there = there[row : row + 1] if name in ("final", "dinitial") else there[:, :, begin:end]
            assert torch.equal(x[:1], there), name
            assert torch.equal(x[1:], there), name


@on_both
@pytest.mark.parametrize("reverse", [False, True])
def test_a_bad_token_is_seen_only_behind(reverse):
    def tile_outputs(a, b, c, states, log_decay, tiles, **options):
        g = log_decay[None, :, None] * torch.arange(1, tiles.num_tokens + 1, device=log_decay.device).remainder(5)
        return triton_block.tile_outputs(a, b, c, states, g, tiles, **options)

    device = torch.device(DEVICE)
    assert_seen_only_behind(tile_outputs, [63, 64, 140], reverse=reverse, tiles=Tiles(128, (0, 150)), device=device)


@on_both
@pytest.mark.parametrize("bad", [0.5, math.nan])
def test_a_decay_that_is_none_shows_from_its_token_on(bad):
    tiles = Tiles(128, (0, 150))
    q, k, v, _, initial, _ = draw(tiles, 16, 16, heads=1)
    outputs, g = [], decays("usual", 1, 150)
    for token in (None, 40):
        if token is not None:
            g[0, 0, token] = bad
        states = triton_block.tile_states(k, v, g, tiles, reverse=False)
        final = triton_block.fold(states, initial, triton_block.transitions(g, tiles), tiles, reverse=False)
        options = {"reverse": False, "scale": 1.0, "state_scale": 1.0, "out_dtype": q.dtype}
        outputs.append(triton_block.tile_outputs(q, k, v, states, g, tiles, **options))
    assert torch.equal(outputs[1][:, :, :40], outputs[0][:, :, :40])
    assert outputs[1][:, :, 40:].isnan().all()
    assert final.isnan().all()


@on_both
def test_sums_of_any_order_are_two_numbers():
    """They restart every 64 tokens of a tile, are right to 2^-40 of a step, and know tiles of any length."""
    tiles = Tiles(256, (0, 70, 400))
    g = decays("mixed", 2, 400)
    sums, exact = triton_block.token_sums(g, tiles).double().sum(-1), torch.zeros_like(g, dtype=torch.float64)
    for start, length in tiles.spans:
        for begin in range(start, start + length, 64):
            own = slice(begin, min(begin + 64, start + length))
            exact[:, :, own] = g[:, :, own].double().cumsum(-1)
    assert (sums - exact).abs().max() < 1e-9
    keep = triton_block.transitions(g / 100, tiles)
    assert relative_error(keep, plain.transitions((g / 100).double(), tiles)) < 1e-7


@on_both
@pytest.mark.parametrize("bounds", [(0, 9000), (0, 1, 70, 70, 5000, 9000)])
def test_transitions_are_exact_sums_rounded_once(bounds):
    """Of tiles of any length, and decays of any strength, in units of 2^-44; of a NaN, or a step up, NaN."""
    tiles, heads = Tiles(8192, bounds), ("weak", "usual", "mixed", "new starts", "strong")
    g = torch.cat([decays(kind, 1, 9000) for kind in heads], 1)
    g[0, 1, ::7] *= 1e-9
    g[0, 4] = g[0, 4].clamp_max(0)
    wide = torch.stack((g, g), -1)[..., 0]
    units = (g.cpu().double().clamp_min(-128) * 2.0**44).long()
    exact = [[sum(row[at : at + n].tolist()) for at, n in tiles.spans] for row in units[0]]
    found = triton_block.transitions(wide, tiles)
    assert torch.equal(found.cpu()[0].double(), (torch.tensor(exact).double() * 2.0**-44).exp().float().double())
    g[0, 0, 8999], g[0, 1, 0] = math.nan, 1e-30
    bad = triton_block.transitions(g, tiles).isnan()
    assert bad.sum() == 2
    assert bad[0, 0, -1]
    assert bad[0, 1, 0]


@pytest.mark.gpu
@pytest.mark.real_empty  # what a recorded call may not do
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0, 5000), (0, 1, 1300, 5000)])
def test_both_passes_again(bounds, dtype):
    """Recorded and repeated with other inputs; in more programs than a GPU has processors, and in bf16."""
    tiles = Tiles(256, bounds)

    def inputs():
        return [*draw(tiles, 128, 64, heads=32, dtype=dtype, q_heads=8, k_heads=8), decays("mixed", 32, 5000)]

    def passes(*given):
        return tuple(both_passes(triton_block, *given, tiles).values())

    first, second = inputs(), inputs()
    passes(*first)  # a thread's first launch binds the device, which is more than a launch
    _, repeat = replay.record(passes, first, tuple(first))
    assert repeat is not None
    for again, once in zip(repeat(second), passes(*second), strict=True):
        assert torch.equal(again, once)
    assert_right(second[:-1], second[-1], tiles)


@on_both
def test_decoding_one_token_or_several():
    batch, heads, tokens = 2, 4, 3
    q, k, v, g = (torch.randn(batch, own, tokens, 16, device=DEVICE) for own in (1, 2, 4, 4))
    g = -g[..., 0].abs()
    g[0, 1, 1], g[1, 2, 0] = -math.inf, -1e-7
    state = torch.randn(batch, heads, 16, 16, device=DEVICE)
    pool = state.clone()
    o = decode.steps(q, k, v, pool, g, scale=0.5, index=None, lengths=None)
    exact, final = recurrence(
        *(x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v)), g, scale=0.5, initial_state=state
    )
    assert relative_error(o, exact) < 1e-6
    assert relative_error(pool, final) < 1e-6
    for t in range(tokens):
        token = slice(t, t + 1)
        one, state = decode.step(
            *(x[:, :, token] for x in (q, k, v)), state, g[:, :, token], scale=0.5, out=None
        )  # fmt: skip
        assert torch.equal(one, o[:, :, token])
    assert torch.equal(state, pool)
    g[1, 3, 1] = random.choice((1e-3, math.nan))
    lost = decode.steps(q, k, v, pool, g, scale=0.5, index=None, lengths=None).isnan().all(-1)
    assert lost[1, 3].tolist() == [False, True, True]
    assert int(lost.sum()) == 2
