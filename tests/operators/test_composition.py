"""The kernels of a call, made of choices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from leetdist.operators.composition import _routed, takes


def forward(x: Any, *, reverse: bool, out: Any = None, hop: Any = None) -> str:
    return f"forward {reverse}"


def backward(x: Any, *, reverse: bool, out: Any = None, heads: int | None = None) -> str:
    return f"backward {reverse}"


def choice(function: Any, reverse: bool, rows: int) -> Any:
    """As much of a `Choice` as says who computes what."""
    return SimpleNamespace(
        use=SimpleNamespace(reverse=reverse), facts=SimpleNamespace(rows=rows), function=lambda: function
    )


def test_a_step_that_two_compute_takes_what_both_do() -> None:
    """Each computes its direction; what only one of them would take is not offered."""
    x = torch.empty(1, 1, 1, 16)
    both = _routed((choice(forward, False, 16), choice(backward, True, 16)))
    assert [both(x, reverse=reverse) for reverse in (False, True)] == ["forward False", "backward True"]
    assert {name for name in ("x", "reverse", "out", "hop", "heads") if takes(both, name)} == {"x", "reverse", "out"}
    alone = _routed((choice(forward, False, 16), choice(forward, True, 16)))
    assert alone is forward
    assert takes(alone, "hop")
