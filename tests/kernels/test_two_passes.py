"""All gradients of a decay a token from two passes (kernels/token_decay/cuda/gradients.cu): compiled, run on the CPU,
emulated, and on a Hopper GPU; and what adds up the gradient of log_decay from what they leave."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import ptxas
import pytest
import torch
from emulated import emulated
from test_hopper_cuda import OWN, SHARED_MEMORY, SPILLS
from torch import Tensor

import leetdist
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.token_decay.cuda import gradients, hopper
from leetdist.kernels.token_decay.pytorch import block as exact
from leetdist.reference import relative_error

added_up = pytest.importorskip("leetdist.kernels.token_decay.triton.added_up")
general = pytest.importorskip("leetdist.kernels.token_decay.triton.block")
BF16 = torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_A_GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
SCALE = 0.3
KINDS = ["0", "1e-6", "1e-3", "0.01", "0.03", "0.1", "0.3", "1", "mixed", "rare", "strengths"]


def decays(kind: str, *shape: int) -> Tensor:
    """Around -kind; or hardly any and some of -50 and -inf; a few of -50; from -1e-5 to -10."""
    x, chance = torch.rand(shape), torch.rand(shape)
    if kind == "strengths":
        return -(10 ** (6 * x - 5))
    if kind in ("mixed", "rare"):
        g = -1e-3 * x
        g[chance < (0.1 if kind == "mixed" else 0.003)] = -50.0
        g[chance < (0.03 if kind == "mixed" else 0.0)] = -math.inf
        return g
    return -2 * float(kind) * x


def draw(device: str, tiles: Tiles, kind: str, batch: int = 1, heads: int = 2) -> list[Tensor]:
    """q, k, v, do, states and gradients of states as a call of one segment a tile has them, and log_decay."""
    of_tokens = [torch.randn(batch, tiles.num_tokens, heads, 128).to(device, BF16).transpose(1, 2) for _ in range(4)]
    states = [5 * torch.randn(batch, heads, tiles.count, 128, 128).to(device) for _ in range(2)]
    return [*of_tokens, *states, decays(kind, batch, heads, tiles.num_tokens).to(device)]


def both(inputs: list[Tensor], tiles: Tiles) -> tuple[Tensor, ...]:
    q, k, v, do, states, ends, g = inputs
    dq, kept = gradients.early_gradients(q, k, v, do, states, g, tiles, scale=SCALE)
    return dq, *gradients.late_gradients(q, k, v, do, states, ends, g, tiles, kept, scale=SCALE)


def one_by_one(kernels: Any, inputs: list[Tensor], tiles: Tiles) -> tuple[Tensor, ...]:
    q, k, v, do, states, ends, g = inputs
    options: dict[str, Any] = {"scale": SCALE, "out_dtype": q.dtype}
    return (
        kernels.tile_outputs(do, v, k, states.mT, g, tiles, reverse=False, state_scale=SCALE, **options),
        kernels.tile_outputs(v, do, q, ends.mT, g, tiles, reverse=True, state_scale=1.0, **options),
        kernels.tile_outputs(k, q, do, ends, g, tiles, reverse=True, state_scale=1.0, **options),
    )


def right(inputs: list[Tensor], tiles: Tiles) -> tuple[Tensor, ...]:
    doubles = [x.double() for x in inputs]
    grad = exact.decay_gradient(*doubles, tiles, scale=SCALE)
    return *one_by_one(exact, doubles, tiles), grad


def assert_right(inputs: list[Tensor], tiles: Tiles, found: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(("dq", "dk", "dv", "d log_decay"), found, right(inputs, tiles), strict=True):
        bound = 2e-4 if name == "d log_decay" else 3e-3
        assert relative_error(x, y) < bound, name


@ptxas.NEEDS_NVRTC
@pytest.mark.parametrize("reverse", [False, True])
def test_compiles_and_fits(reverse):
    defines = gradients.defines(gradients.NAMES[0], reverse)
    said = ptxas.report("token_decay/cuda/gradients.cu", "sm_90a", defines)
    assert all(gradients.shared_memory(name, reverse) + OWN <= SHARED_MEMORY for name in gradients.NAMES)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled, said
    assert int(spilled[1]) <= SPILLS[False], said
    assert "serialized" not in said, said


@ptxas.NEEDS_NVRTC
def test_the_second_pass_compiles():
    ptxas.report("token_decay/cuda/gradients.cu", "sm_90a", gradients.defines(gradients.NAMES[1], True))


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The passes on the CPU, and their sums added up in PyTorch."""

    def in_pytorch(*given: Any, scale: float, out: Tensor | None) -> Tensor:
        assert out is None
        log_decay, tiles, read, written, across, lost = given[6:]
        a, b, inside = read.double().sum(2), *written.double().unbind(2)
        whole = torch.zeros_like(a)
        for row in range(a.shape[1]):
            for number, (begin, length) in enumerate(tiles.spans):
                phi = across[0, row, number].double()
                for first in range(begin, begin + length, 64):
                    own = slice(first, min(first + 64, begin + length))
                    passes = 0.0 if log_decay[0, row, own].sum() < -14 else phi - a[0, row, own].sum()
                    phi = passes + b[0, row, own].sum()
                    later = a[0, row, own].flip(0).cumsum(0).flip(0)
                    earlier = b[0, row, own].cumsum(0).roll(1)
                    earlier[0] = 0.0
                    whole[0, row, own] = inside[0, row, own] + later + earlier + passes
        if any(x.any() for x in lost):
            whole.fill_(math.nan)
        return whole.float()

    monkeypatch.setattr(added_up, "added_up", in_pytorch)
    with emulated():
        gradients._kernel.cache_clear()
        yield
        gradients._kernel.cache_clear()


def test_emulated(emulation):
    """Against fp64, in documents that end anywhere, and with something that is not finite."""
    tiles = Tiles(128, (0, 70, 70, 100))
    inputs = draw("cpu", tiles, "mixed", heads=1)
    found = both(inputs, tiles)
    assert_right(inputs, tiles, found)
    for name, place, token in (("k", 1, 66), ("do", 3, 5)):
        bad = list(inputs)
        bad[place] = bad[place].clone()
        bad[place][0, 0, token, 9] = math.inf
        dq, dk, dv, _ = both(bad, tiles)
        lost = [torch.zeros_like(x, dtype=torch.bool) for x in (dq, dk, dv)]
        if name == "k":
            lost[0][0, 0, 66:70, 9] = lost[2][0, 0, 66] = True
        else:
            lost[0][0, 0, 5] = lost[1][0, 0, :6] = lost[2][0, 0, :6, 9] = True
        for got, good, gone in zip((dq, dk, dv), found, lost, strict=False):
            assert torch.equal(got[~gone], good[~gone])
            assert not got[gone].isfinite().any()


@pytest.mark.interpreter
def test_added_up_interpreted(monkeypatch):
    """From sums in fp64, in pieces of two chunks; tiles that are lost are walked again, with v times its weights."""
    monkeypatch.setattr(added_up, "CHUNKS", 2)
    tiles = Tiles(256, (0, 65, 65, 330))
    q, k, x, do = (torch.randn(1, 2, tiles.num_tokens, 16, dtype=torch.float16) for _ in range(4))
    weight = torch.rand(1, 2, tiles.num_tokens)
    v = exact.weighted_values(x, weight)
    states, ends = (torch.randn(1, 2, tiles.count, 16, 16) for _ in range(2))
    g = decays("0.01", 1, 2, tiles.num_tokens)
    g[0, 0, 10], g[0, 0, 100], g[0, 1, 300] = -math.inf, -50.0, -20.0
    inputs = [q, k, v, do, states, ends, g]
    expected = exact.decay_gradient(*(x.double() for x in inputs), tiles, scale=SCALE)
    read, written, across = sums(inputs, tiles)
    for lost in ([0] * 6, [0, 1, 0, 0, 0, 1]):
        flags = tuple(torch.tensor(x, dtype=torch.int32) for x in (lost, [lost[-1], 0, 0, 0, 0, 0]))
        if any(lost):
            written[0, 0, :, :65], written[0, 0, :, 65:321] = math.nan, math.nan
            written[0, 1, :, 321:] = math.nan

        def call(v: Tensor, parts: int, flags: Any = flags, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
            a = read.clone() if parts == 2 else read.sum(2, keepdim=True)  # what is given is written over
            left = a, written.clone(), across, tuple(x.clone() for x in flags)
            return added_up.added_up(q, k, v, do, states, ends, g, tiles, *left, scale=SCALE, **more), *left[:2]

        found, own, left = call(v, 2)
        assert torch.equal(call(x, 2, weight=weight)[0], found)
        assert relative_error(found, expected) < (1e-3 if any(lost) else 1e-6)
        # The peak of the pass: of A in one part, and B and the pairs, the memory is used again.
        one, own, left = call(v, 1)
        assert torch.equal(one, found)
        assert one.data_ptr() == own.data_ptr()
        if any(lost):
            here = slice(*tiles.spans[1][:1], sum(tiles.spans[1]))
            by_token = left.view(1, 2, tiles.num_tokens, 2)[0, 0, here]
            assert torch.equal(by_token, general.token_sums(g, tiles)[0, 0, here])


def sums(inputs: list[Tensor], tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """What the passes leave, token by token."""
    q, k, v, do, states, ends, g = (x.double() for x in inputs)
    g = g.clamp_min(-1e4)
    read, written = torch.zeros(2, *g.shape[:2], 2, tiles.num_tokens)
    across = torch.zeros(*g.shape[:2], tiles.count)
    for head in range(g.shape[1]):
        for number, (begin, length) in enumerate(tiles.spans):
            state, gradient = states[0, head, number], ends[0, head, number]
            chunks = [slice(i, min(i + 64, begin + length)) for i in range(begin, begin + length, 64)]
            for own in chunks:
                q_i, k_i, v_i, do_i, g_i = (x[0, head, own] for x in (q, k, v, do, g))
                to_end = (g_i.sum() - g_i.cumsum(0)).exp()
                read[0, head, 0, own] = SCALE * g_i.cumsum(0).exp() * ((q_i @ state) * do_i).sum(1) / 4
                read[0, head, 1, own] = 3 * read[0, head, 0, own]
                state = g_i.sum().exp() * state + (k_i * to_end[:, None]).T @ v_i
            for own in reversed(chunks):
                q_i, k_i, v_i, do_i, g_i = (x[0, head, own] for x in (q, k, v, do, g))
                passed = g_i.cumsum(0)
                written[0, head, 0, own] = (passed[-1] - passed).exp() * ((k_i @ gradient) * v_i).sum(1)
                pairs = (q_i @ k_i.T) * (do_i @ v_i.T) * SCALE
                pairs = (pairs * (passed[:, None] - passed).clamp_max(0).exp()).tril(-1)
                written[0, head, 1, own] = torch.stack([pairs[t:, :t].sum() for t in range(len(g_i))])
                gradient = passed[-1].exp() * gradient + SCALE * (q_i * passed.exp()[:, None]).T @ do_i
            across[0, head, number] = (states[0, head, number] * gradient).sum()
    return read, written, across


def folded(inputs: list[Tensor], tiles: Tiles) -> list[Tensor]:
    """The same with the states that a call has."""
    q, k, v, do, _, _, g = inputs
    keep = general.transitions(g, tiles)
    states = hopper.tile_states(k, v, g, tiles, reverse=False)
    general.fold(states, None, keep, tiles, reverse=False)
    ends = hopper.tile_states(q, do, g, tiles, reverse=True, scale=SCALE)
    general.fold(ends, None, keep, tiles, reverse=True)
    return [q, k, v, do, states, ends, g]


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tiles", [Tiles(512, (0, 1300)), Tiles(256, (0, 256, 300, 300, 301, 905)), Tiles(4096, (0, 8192))]
)
def test_against_fp64(tiles, kind):
    inputs = folded(draw("cuda", tiles, kind, heads=4), tiles)
    assert_right(inputs, tiles, both(inputs, tiles))


@pytest.mark.gpu
@ON_A_GPU
def test_bits_whatever_is_beside_it():
    """In a larger batch, with documents behind it, run to run, and where log_decay lies otherwise in memory."""
    tiles = Tiles(128, (0, 150, 321))
    inputs = draw("cuda", tiles, "mixed", batch=64)
    whole = both(inputs, tiles)
    last = [x[-1:].contiguous() for x in inputs]
    for _ in range(5):
        assert all(torch.equal(x, y[-1:]) for x, y in zip(both(last, tiles), whole, strict=True))
    for span, part in ((slice(0, 150), slice(0, 2)), (slice(150, 321), slice(2, 4))):
        tokens = [x[:, :, span].contiguous() for x in (*last[:4], last[6])]
        odd = torch.empty(tokens[4].numel() + 1, device="cuda")[1:].view_as(tokens[4]).copy_(tokens[4])
        mine = [*tokens[:4], *(x[:, :, part].contiguous() for x in last[4:6]), odd]
        alone = both(mine, Tiles(128, (0, span.stop - span.start)))
        assert all(torch.equal(x, y[-1:, :, span]) for x, y in zip(alone, whole, strict=True))


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("operand", range(7))
def test_what_is_not_finite_reaches_as_far_as_in_kernels_of_their_own(operand):
    tiles = Tiles(256, (0, 400))
    inputs = draw("cuda", tiles, "0.01")
    good = both(inputs, tiles)
    for token in (0, 63, 70, 255, 300):
        bad = [x.clone() for x in inputs]
        value = (math.nan, 1.0 if operand == 6 else math.inf)[token % 2]
        place = (0, 1, token) if operand == 6 else (0, 1, token // 256, 3, 7) if operand > 3 else (0, 1, token, 5)
        bad[operand][place] = value
        found, apart = both(bad, tiles), one_by_one(hopper, bad, tiles)
        for x, y, z in zip(found, apart, good, strict=False):
            assert torch.equal(x.isfinite(), y.isfinite())
            assert torch.equal(x[x.isfinite()], z[x.isfinite()])
        grad = general.decay_gradient(*bad, tiles, scale=SCALE)
        assert torch.equal(found[3].isfinite(), grad.isfinite())
        assert torch.equal(found[3][:, 0], good[3][:, 0])


@pytest.mark.gpu
@ON_A_GPU
def test_a_call_uses_them_and_ranks_have_its_bits():
    tokens, tile = 5000, 512
    given = [torch.randn(1, 4, tokens, 128, device="cuda", dtype=BF16) for _ in range(4)]
    given.append(decays("0.01", 1, 4, tokens).cuda())

    def call(own: slice, **options: Any) -> list[Tensor]:
        q, k, v, do, g = (x[:, :, own] for x in given)
        leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
        o = leetdist.linear_attention(*leaves, tile=tile, **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    learnt = [x.detach().requires_grad_() for x in (*given[:3], given[4])]
    assert "gradients of k, v and log_decay" in str(leetdist.explain(*learnt, tile=tile))
    whole = call(slice(0, tokens))
    for ranks in (2, 3, 5):
        bounds = [tile * (10 * rank // ranks) for rank in range(ranks)] + [tokens]
        parts = leetdist.virtual_ranks(
            lambda group, bounds=bounds: call(slice(bounds[group.rank], bounds[group.rank + 1]), group=group), ranks
        )
        for x, shards in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(x, torch.cat(shards, 2))
