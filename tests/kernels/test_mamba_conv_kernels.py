"""The causal convolution in Triton: what PyTorch computes, wherever the sequence is cut and whatever lies where."""

from __future__ import annotations

import pytest
import torch

from leetdist.kernels.mamba.pytorch import conv as right
from leetdist.reference import relative_error

theirs = pytest.importorskip("leetdist.kernels.mamba.triton.conv")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.gpu
HALF = torch.bfloat16 if GPU else torch.float16
BOUNDS = {torch.float32: 4e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}
# More than a segment of sums, and than a program's channels; few where a block of tokens takes a second.
TOKENS, CHANNELS = (261, 150) if GPU else (18, 5)


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        for name in ("TOKENS", "TOKENS_BACK", "SEGMENT"):
            monkeypatch.setattr(theirs, name, 16)


def doubled(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


def make(taps: int, dtype: torch.dtype, documents: bool):
    def tokens(count: int) -> torch.Tensor:  # views of wider rows
        return torch.randn(2, count, CHANNELS + 2, device=DEVICE).to(dtype)[..., 1 : CHANNELS + 1]

    width = taps - 1
    ids = (
        torch.randint(0, TOKENS // 4, (2, width + TOKENS + width), device=DEVICE).sort(1).values if documents else None
    )
    around = right.Around(tokens(width), ids)
    weight = torch.randn(CHANNELS, taps, device=DEVICE)
    return tokens(TOKENS), tokens(TOKENS), weight, torch.randn(CHANNELS, device=DEVICE), around


@pytest.mark.parametrize(
    ("taps", "dtype", "documents", "activated"),
    [
        (4, HALF, False, True),
        pytest.param(4, torch.float32, True, True, marks=pytest.mark.interpreter),
        pytest.param(3, torch.float32, False, False, marks=pytest.mark.interpreter),
        (1, HALF, False, True),
    ],
)
def test_is_pytorchs(taps: int, dtype: torch.dtype, documents: bool, activated: bool) -> None:
    x, dy, weight, bias, around = make(taps, dtype, documents)
    exact = right.Around(around.before.double(), around.documents)
    y = theirs.convolution(x, weight, bias, around, activated)
    assert y.dtype == dtype
    assert (
        relative_error(y, right.convolution(x.double(), weight.double(), bias.double(), exact, activated))
        < (BOUNDS[dtype])
    )
    found = theirs.convolution_gradient(dy, x, weight, bias, around, activated, (True, True))
    wanted = right.convolution_gradient(
        dy.double(), x.double(), weight.double(), bias.double(), exact, activated, (True, True)
    )
    for name, one, other in zip(found._fields, found, wanted, strict=True):
        assert one.shape == other.shape, name
        assert one.numel() == 0 or relative_error(one, other) < BOUNDS[dtype if name in "x before" else torch.float32]


@pytest.mark.parametrize("documents", [pytest.param(False, marks=pytest.mark.interpreter), True])
def test_bits_of_a_sequence_that_is_cut(documents: bool) -> None:
    """The second part has one token, so that what sees the first part's end is partly beyond the sequence."""
    x, dy, weight, bias, around = make(4, torch.float32, documents)
    x[:, -1] = torch.nan
    cut, ids = TOKENS - 1, around.documents
    whole = theirs.convolution(x, weight, bias, around, True)
    grads = theirs.convolution_gradient(dy, x, weight, bias, around, True, (False, False))
    rest = torch.zeros(2, 3, CHANNELS, device=DEVICE)
    after = [torch.cat((y[:, cut:], rest), 1)[:, :3] for y in (x, dy)]
    first = right.Around(around.before, None if ids is None else ids[:, : cut + 6], 1, *after)
    second = right.Around(x[:, cut - 3 : cut], None if ids is None else ids[:, cut:])
    parts = [(x[:, :cut], dy[:, :cut], first), (x[:, cut:], dy[:, cut:], second)]
    found = [theirs.convolution(own, weight, bias, at, True) for own, _, at in parts]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=0, equal_nan=True)
    own = [theirs.convolution_gradient(g, y, weight, bias, at, True, (False, False)) for y, g, at in parts]
    torch.testing.assert_close(torch.cat([each.x for each in own], 1), grads.x, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(own[0].before, grads.before)
    assert bool(grads.x[:, :-4].isfinite().all())
