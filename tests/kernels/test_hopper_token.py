"""The CUDA C++ kernels for Hopper with a decay a token: run on the CPU, emulated, and on a Hopper GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from emulated import emulated
from test_bad_tokens import assert_seen_only_behind

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper as constant
from leetdist.kernels.runtime import replay
from leetdist.kernels.token_decay.cuda import hopper
from leetdist.kernels.token_decay.pytorch import block as exact
from leetdist.reference import relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_A_GPU = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
BOUNDS = {BF16: 3e-3, FP16: 4e-4}
PACKED = Tiles(192, (0, 65, 65, 130, 300))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with emulated() if request.param == "emulated" else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


def decays(kind: str, *shape: int) -> torch.Tensor:
    g = -torch.rand(shape)
    if kind == "mixed":  # hardly any, some of -50, and states that start anew
        chance, g = torch.rand(shape), 1e-3 * g
        g[chance < 0.1], g[chance < 0.03] = -50.0, -math.inf
    return g if kind == "mixed" else g * {"weak": 1e-5, "usual": 1.0}[kind]


def draw(device: str, tiles: Tiles, rows: int, columns: int, dtype: torch.dtype, kind: str, batch: int = 1) -> Any:
    """a, b, c, states and log_decay: 4 heads, of which b has half and a a quarter, (B, N, H, D) in memory."""
    heads, tokens = 4, tiles.num_tokens
    a, b, c = (
        torch.randn(batch, tokens, own, dim).to(device, dtype).transpose(1, 2)
        for own, dim in ((1, rows), (2, rows), (4, columns))
    )
    states = torch.randn(batch, heads, tiles.count, rows, columns).to(device)
    return a, b, c, states, decays(kind, batch, heads, tokens).to(device)


def compare(
    device: str,
    tiles: Tiles,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    reverse: bool,
    kind: str,
    wide: bool = False,
    size: float = 1.0,
) -> None:
    """Outputs and states against fp64, head by head. size: of the states, which are read with its inverse, as all is:
    outputs that see no state are so small that fp16 rounds them worse, and no head may have these alone."""
    a, b, c, states, g = draw(device, tiles, rows, columns, dtype, kind)
    if size > 1.0:
        g[:, :, [start for start, _ in tiles.spans]] = 0.0
    options: dict[str, Any] = {"reverse": reverse, "scale": 0.5 / size, "state_scale": 0.7 / size}
    out = torch.full((1, 4, tiles.num_tokens, columns), math.nan, dtype=FP32 if wide else dtype, device=device)
    hopper.tile_outputs(a, b, c, size * states, g, tiles, out_dtype=out.dtype, out=out, **options)
    doubles = a.double(), b.double(), c.double()
    expected = exact.tile_outputs(
        *doubles, size * states.double(), g.double(), tiles, out_dtype=torch.float64, **options
    )
    added = torch.full((1, 4, tiles.count, rows, columns), math.nan, device=device)
    hopper.tile_states(b, c, g, tiles, reverse=reverse, scale=0.3, out=added)
    expected_added = exact.tile_states(*doubles[1:], g.double(), tiles, reverse=reverse, scale=0.3)
    for head in range(4):
        assert relative_error(out[:, head], expected[:, head]) < BOUNDS[dtype]
        assert relative_error(added[:, head], expected_added[:, head]) < 2e-5


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "reverse", "kind"),
    [
        (64, 64, BF16, False, "mixed"),
        (128, 64, FP16, True, "mixed"),
        (256, 64, BF16, True, "weak"),
    ],
)
def test_emulated_against_fp64(rows, columns, dtype, reverse, kind):
    with emulated():
        compare("cpu", PACKED, rows, columns, dtype, reverse=reverse, kind=kind, wide=reverse)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("tiles", [Tiles(512, (0, 1300)), Tiles(128, (0, 128, 300, 300, 301, 905))], ids=str)
@pytest.mark.parametrize("kind", ["weak", "usual", "mixed"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_against_fp64(dtype, reverse, kind, tiles):
    for rows, columns in ((64, 64), (64, 128), (128, 64), (128, 256), (256, 64), (256, 256)):
        for wide in (False, True):
            compare("cuda", tiles, rows, columns, dtype, reverse=reverse, kind=kind, wide=wide, size=1e6)


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("kind", ["weak", "mixed"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (128, 64), (64, 128)])
def test_long_tiles_against_fp64(rows, columns, kind):
    """More tiles than are walked at a time, each of 4,096 tokens."""
    compare("cuda", Tiles(4096, (0, 131072)), rows, columns, BF16, reverse=False, kind=kind)
    compare("cuda", Tiles(4096, (0, 131072)), rows, columns, BF16, reverse=True, kind=kind)


def test_zeros_give_the_bits_of_no_decay(device):
    everywhere = [(64, 64, False), (128, 128, True), (128, 64, False), (256, 128, True), (256, 128, False)]
    for rows, columns, reverse in everywhere if device == "cuda" else everywhere[:1]:
        a, b, c, states, g = draw(device, PACKED, rows, columns, BF16, "usual")
        none, zeros = torch.zeros(4, device=device), torch.zeros_like(g)
        options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 0.7, "out_dtype": BF16}
        assert torch.equal(
            hopper.tile_outputs(a, b, c, states, zeros, PACKED, **options),
            constant.tile_outputs(a, b, c, states, none, PACKED, **options),
        )
        assert torch.equal(
            hopper.tile_states(b, c, zeros, PACKED, reverse=reverse),
            constant.tile_states(b, c, none, PACKED, reverse=reverse),
        )


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 64), (128, 128), (256, 128)])
def test_a_constant_gate_is_a_constant_decay(rows, columns, reverse):
    a, b, c, states, g = draw("cuda", PACKED, rows, columns, BF16, "usual")
    decay = torch.tensor([-1e-4, -0.01, -0.3, -4.0], device="cuda")
    options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 0.7, "out_dtype": FP32}
    out = hopper.tile_outputs(a, b, c, states, decay[:, None].expand_as(g).contiguous(), PACKED, **options)
    expected = constant.tile_outputs(a, b, c, states, decay, PACKED, **options)
    assert relative_error(out, expected.double()) < 1e-3


@pytest.mark.parametrize("reverse", [False, True])
def test_bits_of_a_row_whatever_is_beside_it(device, reverse):
    """In a larger batch, with documents behind it, with other heads, and where log_decay lies otherwise in memory."""
    shapes = ((64, 64), (128, 64), (128, 128), (256, 128)) if device == "cuda" else ((64, 64),)
    for rows, columns in shapes:
        tiles, batch = Tiles(128, (0, 150, 321)), 64 if device == "cuda" else 2
        a, b, c, states, g = draw(device, tiles, rows, columns, BF16, "mixed", batch)
        options: dict[str, Any] = {"reverse": reverse, "scale": 0.5, "state_scale": 0.7, "out_dtype": BF16}
        whole = hopper.tile_outputs(a, b, c, states, g, tiles, **options)
        added = hopper.tile_states(b, c, g, tiles, reverse=reverse)
        assert whole.isfinite().all()
        assert added.isfinite().all()
        for _ in range(5 if device == "cuda" else 0):
            assert torch.equal(hopper.tile_outputs(a, b, c, states, g, tiles, **options), whole)
            assert torch.equal(hopper.tile_states(b, c, g, tiles, reverse=reverse), added)
        last = slice(batch - 1, batch)
        for span, tiles_, name in ((slice(0, 150), slice(0, 2), 150), (slice(150, 321), slice(2, 4), 171)):
            one = Tiles(128, (0, name))
            mine = [x[last, :, span].contiguous() for x in (a, b, c, g)]
            odd = torch.empty(mine[3].numel() + 1, device=device)[1:].view_as(mine[3]).copy_(mine[3])
            out = hopper.tile_outputs(*mine[:3], states[last, :, tiles_], odd, one, **options)
            assert torch.equal(out, whole[last, :, span])
            assert torch.equal(hopper.tile_states(*mine[1:3], odd, one, reverse=reverse), added[last, :, tiles_])


@pytest.mark.parametrize("reverse", [False, True])
def test_bad_tokens_emulated(reverse):
    with emulated():
        assert_seen_only_behind(
            hopper.tile_outputs, [0, 63, 64, 129], reverse=reverse, tiles=Tiles(128, (0, 150)), rows=64, columns=64,
            dtype=BF16, heads=1, by_token=True,
        )  # fmt: skip


@pytest.mark.parametrize("bad", [1e-3, math.nan])
def test_a_decay_that_grows_is_nan_from_its_token_on(device, bad):
    tiles = Tiles(128, (0, 200))
    a, b, c, states, g = draw(device, tiles, 64, 64, BF16, "usual")
    options: dict[str, Any] = {"scale": 0.5, "state_scale": 0.7, "out_dtype": BF16}
    for reverse in (False, True):
        good = hopper.tile_outputs(a, b, c, states, g, tiles, reverse=reverse, **options)
        for token in (0, 5, 77, 127):
            wrong = g.clone()
            wrong[0, 2, token] = bad
            found = hopper.tile_outputs(a, b, c, states, wrong, tiles, reverse=reverse, **options)
            lost = torch.zeros_like(good, dtype=torch.bool)
            # Reversed, the token's own decay is between it and those before it, and the state before the tile.
            lost[0, 2, slice(0, token) if reverse else slice(token, 128)] = True
            assert found[lost].isnan().all()
            assert torch.equal(found[~lost], good[~lost])
            added = hopper.tile_states(b, c, wrong, tiles, reverse=reverse)
            assert added[0, 2, 0].isnan().all()
            assert added[0, :, 1].isfinite().all()


@pytest.mark.parametrize("reverse", [False, True])
def test_what_decays_to_nothing_is_not_read(device, reverse):
    """Nor are the tokens before a state that starts anew; but where a decay is no number, all are."""
    tiles = Tiles(5000, (0, 5000))
    _, b, c, _, g = draw(device, tiles, 64, 64, BF16, "weak")
    g[0, 0], g[0, 1], g[0, 2] = -0.05, 0.0, -1e-3
    g[0, 2, 1000 if reverse else 4000] = -math.inf
    g[0, 3, 4000] = math.nan
    far = {0: (104 if reverse else 193) / 0.05, 2: 1000}
    added = hopper.tile_states(b, c, g, tiles, reverse=reverse)
    expected = exact.tile_states(b.double(), c.double(), g.double(), tiles, reverse=reverse)
    for head in range(3):
        assert relative_error(added[:, head], expected[:, head]) < 2e-5
    assert added[0, 3].isnan().all()
    for head, tokens in far.items():
        bad, tokens = c.clone(), int(tokens) + 128
        bad[0, head, slice(tokens, None) if reverse else slice(0, 5000 - tokens)] = math.nan
        assert torch.equal(hopper.tile_states(b, bad, g, tiles, reverse=reverse)[0, :3], added[0, :3])


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.real_empty  # what a recorded call may not do
def test_a_repeated_call_reads_other_decays():
    tiles = Tiles(128, (0, 300))

    def outputs(a, b, c, states, log_decay):
        options: dict[str, Any] = {"reverse": False, "scale": 0.5, "state_scale": 1.0, "out_dtype": BF16}
        return (hopper.tile_outputs(a, b, c, states, log_decay, tiles, **options),)

    inputs = [*draw("cuda", tiles, 128, 128, BF16, "usual")]
    outputs(*inputs)  # a thread's first launch binds the device, which is more than a launch
    _, repeat = replay.record(outputs, inputs, tuple(inputs))
    assert repeat is not None
    for kind in ("weak", "mixed"):
        others = [*draw("cuda", tiles, 128, 128, BF16, kind)]
        assert torch.equal(repeat(others)[0], outputs(*others)[0])
