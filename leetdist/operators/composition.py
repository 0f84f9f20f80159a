"""The kernels of a call's two passes, made of what leetdist.operators.dispatch chooses step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.choice import Choice, Refusals, Use
from leetdist.operators.dispatch import (
    by_rows,
    by_two_passes,
    candidates,
    chosen,
    who_skips,
    who_weighs,
)

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem


def takes(function: Callable[..., Any], option: str) -> bool:
    """Whether a step's function has an option that not every implementation of the step has."""
    return option in inspect.signature(function).parameters


def decay_itself(log_decay: Tensor, tiles: Tiles) -> Tensor:
    """What `fold` takes of a constant decay: its powers, n tokens' decay, it rounds itself."""
    return log_decay


@dataclass(frozen=True, eq=False)
class Kernels:
    """The local primitives of a call's two passes; constant_decay.pytorch.block says what each computes. choices: who
    computes them; used: those that the call needs, without gradients the forward pass's; longest_tile: tokens that they
    may add up one by one. early_gradients, late_gradients: where somebody makes all gradients in two passes. adds_up:
    whether `tile_outputs` is told for how many `heads` outputs are to be added up, and may begin with it.
    weighted_values: forward and backward, v times its weights; None where the pass's kernels see to it themselves.
    skips: whether `tile_outputs` adds what a problem is `skipped` by. finishes: whether `late_gradients` gives v's own
    gradient, and those of its weights and of what it is skipped by.
    row_outputs: outputs of whole sequences without states; unserved: why nobody has them."""

    tile_outputs: Callable[..., Tensor]
    tile_states: Callable[..., Tensor]
    fold: Callable[..., Tensor | None]
    decay_gradient: Callable[..., Tensor]
    early_gradients: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None
    late_gradients: Callable[..., tuple[Tensor, ...]] | None = None
    choices: tuple[Choice, ...] = ()
    used: tuple[Choice, ...] = ()
    longest_tile: int | None = None
    transitions: Callable[..., Tensor] = decay_itself
    adds_up: bool = False
    weighted_values: tuple[Callable[..., Tensor | None], ...] = ()
    skips: bool = False
    finishes: bool = False
    row_outputs: Callable[..., Tensor] | None = None
    unserved: Refusals = ()

    def __str__(self) -> str:
        """Names and versions: ranks with the same compute the same bits."""
        return ", ".join(dict.fromkeys(choice.name for choice in self.used))

    @cached_property
    def recordable(self) -> bool:
        """Whether all launches of the two passes are seen by leetdist.kernels.runtime.recording. (A gradient of decays
        a head, which is summed over tiles and ranks, is never repeated.)"""
        repeated = (c for c in self.choices if (c.use.step, c.facts.operator) != ("decay_gradient", "constant_decay"))
        return all(c.recordable for c in repeated)

    @cached_property
    def writes_into_places(self) -> bool:
        """Whether the kernels can write where they are told: several lanes fill one output."""
        return all(takes(f, "out") for f in (self.tile_states, self.tile_outputs))

    @cached_property
    def folds_between(self) -> bool:
        """Whether `fold` takes states from the rank before, and hands them on, by itself: a `hop`."""
        return takes(self.fold, "hop")


def compose(outputs: str, problem: Problem, tile: int, *, alone: bool = True) -> Kernels:
    """The kernels of a method whose outputs are those of the step `outputs`. They may compute in parts of the tile:
    see `part_of_tile`. alone: nothing else is made of them."""
    regular, square = problem.documents is None, problem.dk == problem.dv
    wide_q, wide_k, wide_v = (
        own < problem.heads and problem.dtype.itemsize == 2
        for own in (problem.q_heads, problem.k_heads, problem.v_heads)
    )
    backward = problem.needs_grad or problem.needs_initial_grad

    def take(step: str, tile: int, *kinds: tuple[bool, bool, bool]) -> list[Choice]:
        """For each (reverse, transposed, wide); the first is the forward pass's."""
        return [
            chosen(
                Use(step, reverse, transposed and not square, wide, regular), problem, tile,
                compiled=backward or place == 0,
            )
            for place, (reverse, transposed, wide) in enumerate(kinds)
        ]  # fmt: skip

    kinds: tuple[tuple[bool, bool, bool], ...] = (
        (False, False, False),
        (False, True, wide_q),
        (True, True, wide_k),
        (True, False, wide_v),
    )
    two_passes: tuple[Choice, ...] = ()
    if problem.needs_decay_grad and alone and outputs == "tile_outputs":
        two_passes = by_two_passes(problem, tile)
        kinds = kinds[:1] if two_passes else kinds
    by_outputs = take(outputs, tile, *kinds)
    longest = [c.implementation.longest_tile for c in by_outputs if c.implementation.longest_tile is not None]
    part = part_of_tile(min(longest, default=None), tile)
    if part != tile:
        by_outputs = take(outputs, part, *kinds)
    both = (False, False, False), (True, False, False)
    by_states, by_fold = take("tile_states", part, *both), take("fold", part, *both)
    learnt = problem.needs_decay_grad and not two_passes
    gradient = chosen(Use("decay_gradient", regular=regular), problem, part, compiled=learnt)
    keep = None
    if candidates("transitions", problem.operator):
        keep = chosen(Use("transitions", regular=regular), problem, part, compiled=True)
    weights: tuple[Choice, ...] = ()
    if problem.weighted:
        passing = (by_states[0], by_outputs[0]) if alone else ()
        weights = (who_weighs(problem, part, passing, reverse=False),)
        weights += (who_weighs(problem, part, two_passes, reverse=True),) if backward else ()
    skips = who_skips(problem, weights[0]) if problem.skipped else ()
    rows, unserved = by_rows(problem, part, (*by_outputs, *by_states)) if alone else ((), ())
    return _composed(
        _Chosen(
            outputs=tuple(by_outputs), states=tuple(by_states), fold=tuple(by_fold), transitions=keep,
            decay_gradient=gradient, two_passes=two_passes, weights=weights, skips=skips, rows=rows, unserved=unserved,
            backward=backward, learnt=learnt, factor_grads=problem.factor_grads,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class _Chosen:
    """Who computes the steps of a call, and which of them it needs: `backward`, the backward pass; `learnt`, the
    gradient of log_decay as a step of its own."""

    outputs: tuple[Choice, ...]
    states: tuple[Choice, ...]
    fold: tuple[Choice, ...]
    transitions: Choice | None
    decay_gradient: Choice
    two_passes: tuple[Choice, ...]
    weights: tuple[Choice, ...]
    skips: tuple[Choice, ...]
    rows: tuple[Choice, ...]
    unserved: Refusals
    backward: bool
    learnt: bool
    factor_grads: bool


@lru_cache(maxsize=512)
def _composed(by: _Chosen) -> Kernels:
    """Plans are remembered by their kernels, so one object."""
    longest = [c.implementation.longest_tile for c in by.outputs if c.implementation.longest_tile is not None]
    keep = () if by.transitions is None else (by.transitions,)
    passes = *by.outputs, *by.states, *by.fold, *keep, *by.two_passes, *by.weights, *by.skips, *by.rows
    used = [choice for choice in passes if by.backward or choice.use.forward] + [by.decay_gradient] * by.learnt
    early, late = (choice.function() for choice in by.two_passes) if by.two_passes else (None, None)
    return Kernels(
        tile_outputs=_routed(by.outputs),
        tile_states=_routed(by.states),
        fold=_routed(by.fold),
        decay_gradient=by.decay_gradient.function(),
        early_gradients=early,
        late_gradients=late,
        choices=(*passes, by.decay_gradient),
        used=tuple(used),
        longest_tile=min(longest, default=None),
        transitions=decay_itself if by.transitions is None else by.transitions.function(),
        adds_up=all(takes(choice.function(), "heads") for choice in by.outputs),
        weighted_values=tuple(choice.function() for choice in by.weights),
        skips=bool(by.skips),
        finishes=by.factor_grads and bool(by.two_passes) and by.weights[-1].implementation.weighs,
        row_outputs=by.rows[0].function() if by.rows else None,
        unserved=by.unserved,
    )


def _routed(choices: tuple[Choice, ...]) -> Callable[..., Any]:
    """One function for all uses of a step: nearly always the same; else by direction and by the state's rows."""
    functions = {(c.use.reverse, c.facts.rows): c.function() for c in choices}
    first = next(iter(functions.values()))
    if all(function is first for function in functions.values()):
        return first

    def routed(x: Tensor, *args: Any, reverse: bool, **kwargs: Any) -> Any:
        return functions[reverse, x.shape[3]](x, *args, reverse=reverse, **kwargs)

    # What `takes` is to find: the options that all of them have.
    shared = [
        x for x in inspect.signature(first).parameters.values() if all(takes(f, x.name) for f in functions.values())
    ]
    routed.__signature__ = inspect.Signature(shared)  # type: ignore[attr-defined]
    return routed


def part_of_tile(longest: int | None, tile: int) -> int:
    """The tile length that kernels compute with which may add up `longest` tokens one by one: the call's, or where that
    is too long for them, a part of it, so that all that lies on the call's grid lies on theirs."""
    if longest is None or tile <= longest:
        return tile
    return next((part for part in range(longest, longest // 8, -1) if tile % part == 0), tile)
