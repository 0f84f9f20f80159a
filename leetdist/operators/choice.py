"""Who computes a step of a call: `Choice`, made by leetdist.operators.dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial, update_wrapper
from typing import Any

from leetdist.kernels.common.blocks import Span, in_blocks
from leetdist.operators.facts import Facts
from leetdist.operators.implementations import Implementation

Refusals = tuple[tuple[Implementation, str], ...]


@dataclass(frozen=True)
class Use:
    """One way in which a call uses a step: what it is compiled for, beside the facts. transposed: for a state of
    (Dv, Dk); wide: outputs in fp32, of heads that are still to be added up; regular: no packed documents."""

    step: str
    reverse: bool = False
    transposed: bool = False
    wide: bool = False
    regular: bool = True

    @property
    def forward(self) -> bool:
        return not self.reverse and not self.transposed


@dataclass(frozen=True)
class Choice:
    """Who computes a step, and why nobody before it."""

    use: Use
    facts: Facts
    implementation: Implementation
    refused: tuple[tuple[Implementation, str], ...]

    @property
    def name(self) -> str:
        return self.implementation.versioned(self.facts)

    @cached_property
    def blocks(self) -> list[Span]:
        """Of the state's rows, which come one after the other."""
        return self.implementation.blocks(self.facts)

    @property
    def recordable(self) -> bool:
        """Whether it does nothing but launch; what blocks say of the decays' gradient is added up by PyTorch."""
        return self.implementation.recordable and (len(self.blocks) == 1 or self.use.step != "decay_gradient")

    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = self.implementation.function(self.use.step)
        precision = self.facts.precision
        if precision is not None and self.implementation.takes_precision and self.use.step in PRECISE:
            function = _with_precision(function, precision)
        if len(self.blocks) == 1:
            return function
        begin, end = self.blocks[-1]  # a full one
        return in_blocks(function, self.use.step, end - begin)


PRECISE = ("tile_states", "tile_outputs")  # steps that know `precision`


@lru_cache(maxsize=64)
def _with_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    return update_wrapper(partial(function, precision=precision), function)
