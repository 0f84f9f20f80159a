"""What each method costs, and what "auto" takes: one model, its constants (costs.json) measured.

    time = max(fixed, per_state x B H (number of tiles) + per_token x B H N)

of a forward: the host takes `fixed` to start it, whatever the device has to do. `per_token` and `per_state` are for
Dk = Dv = 128, and in proportion to their product for other sizes. `benchmarks/leetdecoding.py --fit` fits the constants
to its own measurements (least squares of relative errors).

A method is part of what a call means, to the last bit. So "auto" may look at nothing that the contract lets vary: not
at the number of ranks, the batch, the heads, the gradients wanted, nor, once the tile is known, at the length. What is
left is the tile, the head sizes, the dtype and the chip. It takes the method that is never far from the best, whatever
the batch: that whose ratio to the fastest is least, at worst, over 1, 4 and 16 x 32 heads of the tile's usual length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leetdist.kernels.common.tiles import ceil_div
from leetdist.sequence.grid import default_tile

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem

# All work under a group. The first is taken if it is as good as any, to within NOISE: two measurements of one thing
# differ by as much.
SHARDED = ("block", "lightning", "fleet", "causal_dot_product")
# Tokens; lightning is block, kernel by kernel, in tiles that are no longer.
LIGHTNING_BLOCK = 256
BY_TOKEN = ("fleet", "causal_dot_product")  # measured with the kernels of CUDA C++, or on a CPU
NOISE = 1.03
HEADS = (32, 128, 512)  # of 1, 4 and 16 batch entries
FILE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class Cost:
    """fixed: microseconds; per_state: nanoseconds a tile and head; per_token: nanoseconds a token and head."""

    fixed: float
    per_state: float
    per_token: float

    def seconds(self, heads: int, tokens: int, tile: int, size: float) -> float:
        """heads: of all batch entries together; size: of a state, in states of 128 x 128."""
        work = (self.per_state * ceil_div(tokens, tile) + self.per_token * tokens) * heads * size
        return max(self.fixed * 1e-6, work * 1e-9)


@dataclass(frozen=True)
class MethodChoice:
    """The method that "auto" takes; for each candidate, the seconds of 4 x 32 heads by the model, and its ratio to the
    best at worst; where the constants are from."""

    method: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    measured_on: str


def load(file: Path = FILE) -> dict[str, dict[bool, dict[str, Cost]]]:
    """measured_on -> 16-bit dtypes -> method -> cost"""
    content = json.loads(file.read_text())
    return {
        where: {half: {name: Cost(*x) for name, x in costs[kind].items()} for half, kind in KINDS.items()}
        for where, costs in content.items()
    }


KINDS = {True: "16 bit", False: "fp32"}
COSTS = load()


def choose(problem: Problem, tile: int, *, where: str, token_scan: bool) -> MethodChoice:
    """The method for `problem` on tiles of `tile` tokens. where: the constants measured with the kernels that block
    will run; token_scan: whether those can run that the methods of BY_TOKEN were measured with."""
    served = [m for m in SHARDED if token_scan or m not in BY_TOKEN]
    if tile <= LIGHTNING_BLOCK:
        served.remove("lightning")
    costs = COSTS[where][problem.dtype.itemsize == 2]
    size, tokens = problem.dk * problem.dv / 128**2, _usual_length(tile)
    times = {h: {method: costs[method].seconds(h, tokens, tile, size) for method in served} for h in HEADS}
    ratios = {method: max(times[h][method] / min(times[h].values()) for h in HEADS) for method in served}
    best = min(ratios, key=ratios.__getitem__)
    if ratios[SHARDED[0]] <= NOISE * ratios[best]:
        best = SHARDED[0]
    return MethodChoice(best, times[HEADS[1]], ratios, where)


def _usual_length(tile: int) -> int:
    """The length whose default tile is `tile`."""
    tokens = tile
    while default_tile(tokens) < tile and tokens < 2**40:
        tokens *= 2
    return tokens
