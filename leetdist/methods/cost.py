"""What each method costs, and what "auto" takes: one model, its constants measured.

    time = fixed + per_state x B H (number of tiles) + per_token x B H N

of a forward; `per_token` and `per_state` for Dk = Dv = 128, and in proportion to their product for other sizes. The
constants are fitted by `benchmarks/leetdecoding.py --fit` to its own measurements (least squares of relative errors).

A method is part of what a call means, to the last bit. So "auto" may look at nothing that the contract lets vary: not
at the number of ranks, the batch, the heads, the gradients wanted, nor, once the tile is known, at the length. What is
left is the tile, the head sizes, the dtype and the chip; the cost is that of 4 x 32 heads and the length whose tile it
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from leetdist.kernels.tiles import ceil_div
from leetdist.sequence.grid import default_tile

if TYPE_CHECKING:
    from leetdist.problem import Problem

# All work under a group. The first is taken unless another is expected to be faster by NOISE: two measurements of one
# thing differ by as much (lightning on tiles of 256 tokens or fewer is block, and is fitted 10 % apart).
CANDIDATES = ("block", "lightning", "fleet", "causal_dot_product")
NOISE = 1.1
ALL_HEADS = 128  # four batch entries of 32 heads


@dataclass(frozen=True)
class Cost:
    """fixed: microseconds; per_state: nanoseconds a tile and head; per_token: nanoseconds a token and head."""

    fixed: float
    per_state: float
    per_token: float

    def seconds(self, heads: int, tokens: int, tile: int, size: float) -> float:
        """heads: of all batch entries together; size: of a state, in states of 128 x 128."""
        tiles = ceil_div(tokens, tile)
        return self.fixed * 1e-6 + (self.per_state * tiles + self.per_token * tokens) * heads * size * 1e-9


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
            "block": Cost(0, 1.84e5, 3.59e3),
            "lightning": Cost(0, 1.74e5, 4.09e3),
            "fleet": Cost(2.25e4, 0, 8.45e4),
            "causal_dot_product": Cost(2.39e3, 7e4, 3.5e4),
        },
        False: {
            "block": Cost(0, 3.19e5, 4.08e3),
            "lightning": Cost(0, 2.47e5, 5.16e3),
            "fleet": Cost(2.62e4, 0, 9.68e4),
            "causal_dot_product": Cost(0, 1.13e6, 3.47e4),
        },
    },
    "sm_90": {  # benchmarks/results/leetdecoding.json, an H200
        True: {
            "block": Cost(124, 89.7, 0.47),
            "lightning": Cost(135, 47, 1.05),
            "fleet": Cost(100, 181, 3.8),
            "causal_dot_product": Cost(97.4, 180, 4.64),
        },
        False: {
            "block": Cost(60, 70, 1.2),  # by hand from benchmarks/NOTES.md: 5.2 ms at 131,072 tokens
            "lightning": Cost(76.8, 0, 10.6),
            "fleet": Cost(95.2, 186, 2.54),
            "causal_dot_product": Cost(97, 183, 3.4),
        },
    },
}


def choose(problem: Problem, tile: int, cuda: bool) -> Choice:
    """The method for `problem` on tiles of `tile` tokens; `cuda`: whether the CUDA C++ kernels can run, which fleet and
    causal_dot_product were measured with."""
    where = _measured_on(problem.device)
    served = [m for m in CANDIDATES if cuda or where == "cpu" or m not in ("fleet", "causal_dot_product")]
    costs = COSTS[where][problem.dtype.itemsize == 2]
    size = problem.dk * problem.dv / 128**2
    seconds = {method: costs[method].seconds(ALL_HEADS, _usual_length(tile), tile, size) for method in served}
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
