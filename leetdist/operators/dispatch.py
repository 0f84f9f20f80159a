"""Which kernels compute a call: facts -> candidates -> the first that does not refuse.

leetdist.operators.implementations has the table; here it is asked, once a kind of call. What comes out has a name and a
version, which the ranks of a group compare, `explain` prints, and the cost model speaks of.

A GPU's kernels are compiled before the first call of a kind computes: each is launched once on a few tokens of zeros.
One that cannot be compiled, or not loaded, is passed over from then on, with one warning, and the next is asked.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.kernels.common.memo import Memo
from leetdist.kernels.common.settings import raw_settings, settings
from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.implementations import CANDIDATES, Facts, Implementation, machine_of

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem

TOKENS = 16  # of the launch that a kernel is tried with


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

    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = self.implementation.function(self.use.step)
        precision = self.facts.precision
        if precision is None or not self.implementation.takes_precision or self.use.step not in PRECISE:
            return function
        return _with_precision(function, precision)


PRECISE = ("tile_states", "tile_outputs")  # steps that know `precision`


@lru_cache(maxsize=64)
def _with_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    return update_wrapper(partial(function, precision=precision), function)


def facts_of(problem: Problem, tile: int, *, transposed: bool = False) -> Facts:
    given = settings()
    rows, columns = (problem.dv, problem.dk) if transposed else (problem.dk, problem.dv)
    return Facts(
        machine_of(problem.device, given), given, problem.dtype, rows, columns, tile, problem.precision,
        problem.operator,
    )  # fmt: skip


def candidates(step: str, operator: str) -> tuple[Implementation, ...]:
    """Those of the table that compute an operator's step."""
    return tuple(candidate for candidate in CANDIDATES[step] if candidate.operator == operator)


Refusals = tuple[tuple[Implementation, str], ...]


def ask(use: Use, facts: Facts) -> tuple[Choice | None, Refusals]:
    """The first candidate that does not refuse, and who did before it."""
    refused: list[tuple[Implementation, str]] = []
    for candidate in candidates(use.step, facts.operator):
        reason = candidate.refuses(facts) or _failed.get((candidate, use, facts))
        if reason is None:
            return Choice(use, facts, candidate, tuple(refused)), tuple(refused)
        refused.append((candidate, reason))
    return None, tuple(refused)


def choose(use: Use, facts: Facts) -> Choice:
    """The first candidate that does not refuse; ValueError in words where all do (which takes a setting)."""
    choice, refused = ask(use, facts)
    if choice is not None:
        return choice
    because = "; ".join(f"{candidate.name}: {reason}" for candidate, reason in refused)
    raise ValueError(
        f"LEETDIST_BACKEND={facts.settings.backend} leaves no kernel for {use.step.replace('_', ' ')} of this call "
        f"({because})"
    )


def chosen(use: Use, problem: Problem, tile: int, *, compiled: bool = False) -> Choice:
    """`choose` for a problem. compiled: only what has been compiled, so that it can compute."""
    facts = facts_of(problem, tile, transposed=use.transposed)
    if compiled and facts.interpreted and not facts.settings.interpreted:
        raise ValueError("LEETDIST_BACKEND=triton on a CPU needs Triton's interpreter: set TRITON_INTERPRET=1 too")
    while True:
        choice = choose(use, facts)
        if not compiled or works(choice, problem):
            return choice


def by_two_passes(problem: Problem, tile: int) -> tuple[Choice, ...]:
    """Who makes all gradients of a call with "early_gradients" and "late_gradients"; mostly nobody: then they are made
    one by one."""
    shares = problem.heads // problem.q_heads, problem.heads // problem.k_heads, problem.heads // problem.v_heads
    facts, found = replace(facts_of(problem, tile), shares=shares), []
    for step in ("early_gradients", "late_gradients"):
        choice, _ = ask(Use(step, regular=problem.documents is None), facts)
        if choice is None or not works(choice, problem):
            return ()
        found.append(choice)
    return tuple(found)


# What could not be compiled, and why; what could; the names that people were told of.
_failed: dict[Hashable, str] = {}
_works: set[Hashable] = set()
_told: set[str] = set()


def works(choice: Choice, problem: Problem) -> bool:
    """Whether the choice's kernel can be compiled and launched here; tried once a kind."""
    implementation, facts, use = choice.implementation, choice.facts, choice.use
    key = implementation, use, facts
    if not implementation.compiler or key in _works:
        return True
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True  # nothing may be tried now
    try:
        rehearse(choice, problem)
    except Exception as error:
        if isinstance(error, _OF_THE_DEVICE):
            raise
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()
        _failed[key] = f"cannot be compiled ({said[0][:300]})"
        if choice.name not in _told:
            _told.add(choice.name)
            other, _ = ask(use, facts)
            instead = "each gradient's own kernel" if other is None else other.name
            warnings.warn(
                f"leetdist: {choice.name} cannot be compiled for {use.step} of {facts.rows} x {facts.columns} in "
                f"{facts.dtype}; {instead} computes it instead. {' '.join(said)[:1000]}",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    _works.add(key)
    return True


# Not a kernel's fault: the device is full, or lost.
_OF_THE_DEVICE = tuple(
    kind for name in ("OutOfMemoryError", "AcceleratorError") if (kind := getattr(torch, name, None)) is not None
)


def rehearse(choice: Choice, problem: Problem) -> None:
    """Compile and launch a choice's kernel once, on a few tokens of zeros; raises what the compiler raises."""
    facts, use = choice.facts, choice.use
    if facts.interpreted:
        return
    device, heads = problem.device, problem.heads
    q_heads, k_heads, v_heads = problem.q_heads, problem.k_heads, problem.v_heads
    compile_for = getattr(choice.implementation.loaded(), "compile_for", None)
    if compile_for is not None:
        programs = problem.batch * heads * max(1, problem.tokens // facts.tile)
        share = heads // min(q_heads, k_heads, v_heads)
        options = facts.dtype, use.wide, use.reverse, programs, device
        compile_for(use.step, facts.rows, facts.columns, *options, share=share)
        return

    count = 1 if use.step in ("step", "steps") else TOKENS

    def tokens(own: int, dim: int) -> Tensor:
        return torch.zeros(1, own, count, dim, dtype=facts.dtype, device=device)

    bounds = (0, TOKENS) if use.regular else (0, TOKENS // 2, TOKENS)
    tiles_ = Tiles(facts.tile, bounds)
    constant = facts.operator == "constant_decay"
    decay = torch.zeros((heads,) if constant else (1, heads, count), dtype=torch.float32, device=device)
    if type(decay) is not Tensor:
        return  # under a mode that makes other tensors, nothing can be tried
    states = torch.zeros(1, heads, tiles_.count, facts.rows, facts.columns, dtype=torch.float32, device=device)
    function, rows, columns = choice.function(), facts.rows, facts.columns
    directed: dict[str, Any] = {"reverse": use.reverse}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if use.step == "transitions":
            function(decay, tiles_)
        elif use.step == "tile_states":
            function(tokens(k_heads, rows), tokens(v_heads, columns), decay, tiles_, **directed)
        elif use.step == "fold":
            keep = decay if constant else decay.new_ones(1, heads, tiles_.count)
            function(states, None, keep, tiles_, **directed)
        elif use.step == "decay_gradient":
            function(
                tokens(q_heads, rows), tokens(k_heads, rows), tokens(v_heads, columns), tokens(heads, columns),
                states, states, decay, tiles_, scale=1.0,
            )  # fmt: skip
        elif use.step in ("step", "steps"):
            more: dict[str, Any] = {"out": None} if use.step == "step" else {"index": None, "lengths": None}
            function(
                tokens(q_heads, rows), tokens(k_heads, rows), tokens(v_heads, columns),
                states[:, :, 0].contiguous(), decay, scale=1.0, **more,
            )  # fmt: skip
        else:
            function(
                tokens(q_heads, rows), tokens(k_heads, rows), tokens(v_heads, columns), states, decay, tiles_,
                **directed, scale=1.0, state_scale=1.0, out_dtype=torch.float32 if use.wide else facts.dtype,
            )  # fmt: skip


# Who decodes, by all that decides on it: a token takes as long as it takes to find out.
_decoders: Memo[Hashable, Choice] = Memo(512)


def decoder(step: str, problem: Problem) -> Choice:
    """Who computes "step" or "steps" of decoding."""
    shared = problem.q_heads < problem.heads, problem.k_heads < problem.heads, problem.v_heads < problem.heads
    key = step, problem.operator, problem.device, problem.dtype, problem.dk, problem.dv, shared, raw_settings()
    found = _decoders.get(key)
    if found is None:
        found = _decoders[key] = chosen(Use(step), problem, 1, compiled=True)
    return found


def decay_itself(log_decay: Tensor, tiles: Tiles) -> Tensor:
    """What `fold` takes of a constant decay: its powers, n tokens' decay, it rounds itself."""
    return log_decay


@dataclass(frozen=True, eq=False)
class Kernels:
    """The local primitives of a call's two passes; constant_decay.pytorch.block says what each computes. choices: who
    computes them; used: those that the call needs, without gradients the forward pass's; longest_tile: tokens that they
    may add up one by one. early_gradients, late_gradients: where somebody makes all gradients in two passes."""

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

    def __str__(self) -> str:
        """Names and versions: ranks with the same compute the same bits."""
        return ", ".join(dict.fromkeys(choice.name for choice in self.used))

    @cached_property
    def recordable(self) -> bool:
        """Whether all launches of the two passes are seen by leetdist.kernels.common.recording. (A gradient of decays
        a head, which is summed over tiles and ranks, is never repeated.)"""
        repeated = (c for c in self.choices if (c.use.step, c.facts.operator) != ("decay_gradient", "constant_decay"))
        return all(c.implementation.recordable for c in repeated)

    @cached_property
    def writes_into_places(self) -> bool:
        """Whether the kernels can write where they are told: several lanes fill one output."""
        return all("out" in inspect.signature(f).parameters for f in (self.tile_states, self.tile_outputs))


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
    return _composed(tuple(by_outputs), tuple(by_states), tuple(by_fold), keep, gradient, two_passes, backward, learnt)


@lru_cache(maxsize=512)
def _composed(
    outputs: tuple[Choice, ...],
    states: tuple[Choice, ...],
    fold: tuple[Choice, ...],
    keep: Choice | None,
    gradient: Choice,
    two_passes: tuple[Choice, ...],
    backward: bool,
    learnt: bool,
) -> Kernels:
    """Plans are remembered by their kernels, so one object."""
    longest = [c.implementation.longest_tile for c in outputs if c.implementation.longest_tile is not None]
    passes = *outputs, *states, *fold, *([] if keep is None else [keep]), *two_passes
    early, late = (choice.function() for choice in two_passes) if two_passes else (None, None)
    used = [choice for choice in passes if backward or choice.use.forward] + [gradient] * learnt
    return Kernels(
        _routed(outputs), _routed(states), _routed(fold), gradient.function(),
        early_gradients=early, late_gradients=late, transitions=decay_itself if keep is None else keep.function(),
        choices=(*passes, gradient), used=tuple(used), longest_tile=min(longest, default=None),
    )  # fmt: skip


def _routed(choices: tuple[Choice, ...]) -> Callable[..., Any]:
    """One function for all uses of a step: nearly always the same; else by direction and by the state's rows."""
    functions = {(c.use.reverse, c.facts.rows): c.function() for c in choices}
    first = next(iter(functions.values()))
    if all(function is first for function in functions.values()):
        return first

    def routed(x: Tensor, *args: Any, reverse: bool, **kwargs: Any) -> Any:
        return functions[reverse, x.shape[3]](x, *args, reverse=reverse, **kwargs)

    everywhere = all("out" in inspect.signature(function).parameters for function in functions.values())
    return update_wrapper(routed, first) if everywhere else routed


def part_of_tile(longest: int | None, tile: int) -> int:
    """The tile length that kernels compute with which may add up `longest` tokens one by one: the call's, or where that
    is too long for them, a part of it, so that all that lies on the call's grid lies on theirs."""
    if longest is None or tile <= longest:
        return tile
    return next((part for part in range(longest, longest // 8, -1) if tile % part == 0), tile)


def backend_of(problem: Problem) -> str:
    """What there is to compute with on this rank, by name and version, before the tile is known."""
    return _backend_of(facts_of(problem, LONG))


def may_fail(backend: str) -> bool:
    """Whether any of it is made by a compiler of kernels, and so may turn out otherwise."""
    return " by " in backend


@lru_cache(maxsize=512)
def _backend_of(facts: Facts) -> str:
    steps = [
        step for step in ("tile_outputs", "fleet_outputs", "token_outputs", "fold") if candidates(step, facts.operator)
    ]
    return ", ".join(dict.fromkeys(choose(Use(step), facts).name for step in steps))


LONG = 4096  # tokens of a tile that no implementation finds too short
