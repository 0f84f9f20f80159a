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

# All work under a group. The first is taken unless another is expected to be faster by NOISE: two measurements of one
# thing differ by as much (lightning on tiles of 256 tokens or fewer is block, and is fitted 10 % apart).
CANDIDATES = ("block", "lightning", "fleet", "causal_dot_product")
NOISE = 1.1
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
    "cpu": {  # benchmarks/results/leetdecoding_cpu.json
        True: {
            "block": Cost(1.12e3, 0, 4.44e3),
            "lightning": Cost(993, 0, 5.03e3),
            "fleet": Cost(2.13e4, 2.52e5, 6.85e4),
            "causal_dot_product": Cost(1.93e3, 9.25e4, 3.11e4),
        },
        False: {
            "block": Cost(2.39e3, 0, 5.23e3),
            "lightning": Cost(1.65e3, 0, 6.2e3),
            "fleet": Cost(2.38e4, 3.74e5, 7.6e4),
            "causal_dot_product": Cost(6.18e3, 7.16e4, 3.65e4),
        },
    },
    "sm_90": {half: {m: Cost(float(i + 1), 0.0, 1.0) for i, m in enumerate(CANDIDATES)} for half in (True, False)},
}


def choose(problem: Problem, tile: int) -> Choice:
    """The method for `problem` on tiles of `tile` tokens."""
    where = _measured_on(problem.device)
    costs = COSTS[where][problem.dtype.itemsize == 2]
    size = problem.dk * problem.dv / 128**2
    seconds = {method: costs[method].seconds(HEADS, _usual_length(tile), tile, size) for method in CANDIDATES}
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] * NOISE > seconds[CANDIDATES[0]]:
        best = CANDIDATES[0]
    return Choice(best, seconds, where)


def _usual_length(tile: int) -> int:
    """The length whose default tile is `tile`."""
    tokens = tile
    while default_tile(tokens) < tile and tokens < 2**40:
        tokens *= 2
    return tokens


def _measured_on(device: torch.device) -> str:
    """The chip measured that is most like the device: other GPUs go by the H200's proportions."""
    return "cpu" if device.type == "cpu" else "sm_90"
