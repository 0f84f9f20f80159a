"""What Mamba-2 does around its attention, in Triton: what PyTorch computes, whatever lies where."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leetdist.kernels.mamba.pytorch import scan as right
from leetdist.kernels.token_decay.pytorch.block import weighted_values
from leetdist.reference import relative_error

theirs = pytest.importorskip("leetdist.kernels.mamba.triton.scan")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.interpreter]
DTYPES = [torch.float32, torch.bfloat16 if GPU else torch.float16]
BOUNDS = {torch.float32: 4e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}
PLAIN = right.Steps(False, 0.0, math.inf)
TOKENS, HEADS = 270 if GPU else 70, 2  # more than a segment of sums, and than what a program turns


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(theirs, "SEGMENT", 64)


CASES: dict[str, dict[str, Any]] = {
    "bare": {},
    "all": {"bias": True, "skip": 1, "starts": True, "steps": right.Steps(True, 0.02, 1.0)},
    "channels": {"skip": 2, "steps": right.Steps(True, 0.0, math.inf)},
    "frozen": {"skip": 1, "bias": True, "needs": (True, False, False, False, False)},
    "learnt": {"skip": 2, "bias": True, "needs": (False, True, False, True, True)},
}


def views(x: torch.Tensor) -> torch.Tensor:
    """x's values, of a larger tensor of other strides."""
    wider = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wider[..., : x.shape[-1]] = x
    return wider.transpose(0, 1).contiguous().transpose(0, 1)[..., : x.shape[-1]].to(DEVICE)


def make(dtype: torch.dtype, width: int, bias=False, skip=0, starts=False, steps=PLAIN):
    def tokens(*shape: int) -> torch.Tensor:
        return views(torch.randn(2, TOKENS, HEADS, *shape, dtype=dtype))

    dt = torch.randn(2, TOKENS, HEADS) * 3
    dt[0, :4, 0] = torch.tensor([-60.0, -17.0, 39.0, 50.0])
    A = -torch.rand(HEADS, device=DEVICE)
    D = None if not skip else torch.randn(*((HEADS,), (HEADS, width))[skip - 1], device=DEVICE)
    return {
        "x": tokens(width), "dt": views(dt if steps.softplus else dt.abs()), "A": A,
        "bias": torch.randn(HEADS, device=DEVICE) if bias else None, "D": D,
        "starts": (torch.rand(2, TOKENS, device=DEVICE) < 0.1) if starts else None,
        "dv": tokens(width), "dlog_decay": torch.randn(2, HEADS, TOKENS, device=DEVICE),
        "dskip": tokens(width) if skip else None, "steps": steps,
    }  # fmt: skip


def doubled(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize(
    ("name", "width", "dtype"),
    [
        ("bare", 64, DTYPES[1]), ("all", 40, DTYPES[0]), ("all", 32, DTYPES[1]), ("channels", 5, DTYPES[0]),
        ("frozen", 16, DTYPES[0]), ("learnt", 1, DTYPES[0]),
    ],
)  # fmt: skip
def test_inputs_and_their_gradient(name: str, width: int, dtype: torch.dtype) -> None:
    case = dict(CASES[name])
    needs = case.pop("needs", (True, True, True, "bias" in case, "skip" in case))
    given = make(dtype, width, **case)
    exact = {key: doubled(x) for key, x in given.items()}
    names = ("x", "dt", "A", "bias", "starts", "steps")
    found = theirs.scan_inputs(*(given[key] for key in names))
    wanted = right.scan_inputs(*(exact[key] for key in names))
    own, log_decay = theirs.scan_steps(*(given[key] for key in names[1:]))
    assert torch.equal(log_decay, found[1])
    assert torch.equal(weighted_values(given["x"].transpose(1, 2), own), found[0].transpose(1, 2))
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert torch.equal(found[1].isinf(), wanted[1].isinf())
    for x, y in zip(found, wanted, strict=True):
        finite = y.isfinite()
        assert relative_error(x[finite], y[finite]) < BOUNDS[dtype]
    grads = theirs.scan_inputs_gradient(**given, needs=needs)
    dv = given["dv"].clone(memory_format=torch.contiguous_format)
    again = theirs.scan_inputs_gradient(**given | {"dv": dv}, needs=needs, own=own, spent=True)
    assert needs[0] == (again.x is dv)
    assert all(x is y or torch.equal(x, y) for x, y in zip(again, grads, strict=True))
    exact_grads = right.scan_inputs_gradient(**exact, needs=needs)
    for key, x, y in zip(grads._fields, grads, exact_grads, strict=True):
        assert (x is None) == (y is None), key
        if x is not None:
            if key not in ("x", "dt"):
                x, y = right.added_up(x), right.added_up(y)
            assert x.shape == y.shape
            assert relative_error(x, y) < BOUNDS[dtype if key == "x" else torch.float32] * 3, key


@pytest.mark.parametrize(
    ("skip", "gate", "width", "dtype"),
    [(0, True, 64, DTYPES[0]), (1, True, 33, DTYPES[1]), (2, True, 8, DTYPES[0]), (2, False, 64, DTYPES[1])],
)
def test_outputs_and_their_gradient(skip: int, gate: bool, width: int, dtype: torch.dtype) -> None:
    given = make(dtype, width, skip=skip)
    o, x, dy = given["dv"], given["x"] if skip else None, given["dskip"] if skip else given["x"]
    z = views(torch.randn(2, TOKENS, HEADS, width, dtype=dtype) * 20) if gate else None
    exact = [doubled(y) for y in (o, x, given["D"], z)]
    y = theirs.scan_outputs(o, x, given["D"], z)
    assert relative_error(y, right.scan_outputs(*exact)) < BOUNDS[dtype]
    own = o.clone(memory_format=torch.contiguous_format)
    assert theirs.scan_outputs(own, x, given["D"], z, spent=True) is own
    assert torch.equal(own, y)
    if gate:
        found = theirs.scan_outputs_gradient(dy, o, x, given["D"], z)
        for one, other in zip(found, right.scan_outputs_gradient(dy.double(), *exact), strict=True):
            assert one.dtype == dtype
            assert relative_error(one, other) < BOUNDS[dtype]


def test_sums_are_the_same_in_a_larger_batch_and_any_layout() -> None:
    given = make(torch.float32, 16, **CASES["all"])
    found = theirs.scan_inputs_gradient(**given, needs=(True,) * 5)
    given = {key: x.contiguous() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    for x, y in zip(theirs.scan_inputs_gradient(**given, needs=(True,) * 5), found, strict=True):
        assert torch.equal(x, y)
    one = {k: x[:1] if isinstance(x, torch.Tensor) and x.ndim > 1 else x for k, x in given.items()}
    alone = theirs.scan_inputs_gradient(**one, needs=(True,) * 5)
    assert torch.equal(alone.x, found.x[:1])
    assert torch.equal(alone.dt, found.dt[:1])
