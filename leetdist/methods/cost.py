"""What each method costs, and what "auto" takes: one model, its constants measured.

    time = fixed + per_step x (tokens of a tile, which a program walks one after the other) + per_token x B H N

of a forward; `per_token` and `per_step` for Dk = Dv = 128, and in proportion to their product for other sizes. The
constants are fitted by `benchmarks/leetdecoding.py --fit` to its own measurements (least squares of relative errors).

A method is part of what a call means, to the last bit. So "auto" may look at nothing that the contract lets vary: not
at the number of ranks, the batch, the heads, the gradients wanted, nor, once the tile is known, at the length. What is
left is the tile, the head sizes, the dtype and the chip; the cost is that of 32 heads and the length whose tile it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from leetdist.sequence.grid import default_tile

if TYPE_CHECKING:
    from leetdist.problem import Problem

# Preference where two cost the same: the first. All work under a group.
CANDIDATES = ("block", "lightning", "fleet", "causal_dot_product")
HEADS = 32


@dataclass(frozen=True)
class Cost:
    """fixed: microseconds; per_step: nanoseconds a token of a tile; per_token: nanoseconds a token and head."""

    fixed: float
    per_step: float
    per_token: float

    def seconds(self, rows: int, tokens: int, tile: int, size: float) -> float:
        walked = min(tile, tokens)
        return self.fixed * 1e-6 + (self.per_step * walked + self.per_token * rows * tokens) * size * 1e-9


@dataclass(frozen=True)
class Choice:
    """The method that "auto" takes, the seconds the model gives each candidate, and where its constants are from."""

    method: str
    seconds: dict[str, float]
    measured_on: str


# measured_on -> 16-bit dtypes -> method -> cost
COSTS: dict[str, dict[bool, dict[str, Cost]]] = {
    "cpu": {half: {m: Cost(float(i + 1), 0.0, 1.0) for i, m in enumerate(CANDIDATES)} for half in (True, False)},
    "sm_90": {half: {m: Cost(float(i + 1), 0.0, 1.0) for i, m in enumerate(CANDIDATES)} for half in (True, False)},
}


def choose(problem: Problem, tile: int) -> Choice:
    """The method for `problem` on tiles of `tile` tokens."""
    where = _measured_on(problem.device)
    costs = COSTS[where][problem.dtype.itemsize == 2]
    size = problem.dk * problem.dv / 128**2
    seconds = {method: costs[method].seconds(HEADS, _usual_length(tile), tile, size) for method in CANDIDATES}
    return Choice(min(seconds, key=seconds.__getitem__), seconds, where)


def _usual_length(tile: int) -> int:
    """The length whose default tile is `tile`."""
    tokens = tile
    while default_tile(tokens) < tile and tokens < 2**40:
        tokens *= 2
    return tokens


def _measured_on(device: torch.device) -> str:
    """The chip measured that is most like the device: other GPUs go by the H200's proportions."""
    return "cpu" if device.type == "cpu" else "sm_90"
