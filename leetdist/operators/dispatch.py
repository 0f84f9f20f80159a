"""Which kernels compute a call: facts -> candidates -> the first that does not refuse.

leetdist.operators.implementations has the table; here it is asked, once a kind of call. What comes out has a name and a
version, which the ranks of a group compare, `explain` prints, and the cost model speaks of.

A GPU's kernels are compiled before the first call of a kind computes (leetdist.operators.rehearsal). One that cannot be
compiled, or not loaded, is passed over from then on, with one warning, and the next is asked.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.settings import raw_settings, settings
from leetdist.operators.choice import Choice, Refusals, Use
from leetdist.operators.facts import Facts, machine_of
from leetdist.operators.implementations import CANDIDATES, CUDA_HOPPER, Implementation
from leetdist.operators.refusals import ONE_CHUNK
from leetdist.operators.rehearsal import rehearse
from leetdist.sequence.site import warn

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem


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
    facts, found = replace(facts_of(problem, tile), shares=_shares(problem)), []
    for step in ("early_gradients", "late_gradients"):
        choice, _ = ask(Use(step, regular=problem.documents is None), facts)
        if choice is None or not works(choice, problem):
            return ()
        found.append(choice)
    return tuple(found)


def by_rows(problem: Problem, tile: int, steps: tuple[Choice, ...]) -> tuple[tuple[Choice, ...], Refusals]:
    """Who computes outputs of whole sequences, and with gradients dq, dk and dv, with the bits of these steps, but no
    states in memory. Often nobody; and then why, where tiles are so short that states are most of what is moved."""
    if any(choice.implementation is not CUDA_HOPPER for choice in steps):
        return (), ()
    documents = problem.documents or (0, problem.tokens)
    longest = max(end - begin for begin, end in pairwise(documents))
    if longest <= tile:  # which need no states anyway
        return (), ()
    shared = problem.grad_mode and _shares(problem) != (1, 1, 1)
    stateless = not (problem.has_initial or problem.return_state or problem.needs_decay_grad or shared)
    # A few long documents among short ones leave most of a GPU with nothing to do.
    sequences = problem.batch * problem.heads * (documents[-1] // longest), ceil_div(longest, tile)
    outputs_alone = stateless and problem.sees_grads and not problem.backend
    found = []
    uses = [(False, False)] + [(False, True), (True, True), (True, False)] * problem.needs_grad
    for reverse, transposed in uses:
        facts = replace(
            facts_of(problem, tile, transposed=transposed),
            sequences=sequences, outputs_alone=outputs_alone, both_passes=problem.needs_grad,
        )  # fmt: skip
        use = Use("row_outputs", reverse, transposed, regular=problem.documents is None)
        choice, refused = ask(use, facts)
        if choice is None or not works(choice, problem):
            return (), refused if tile <= ONE_CHUNK else ()
        found.append(choice)
    return tuple(found), ()


def who_weighs(problem: Problem, tile: int, passing: tuple[Choice, ...], *, reverse: bool) -> Choice:
    """Who multiplies v by its weights for a pass, forward or backward, which `passing` compute."""
    weighs = bool(passing) and all(choice.implementation.weighs for choice in passing)
    facts = replace(facts_of(problem, tile), shares=_shares(problem), weighs=weighs)
    while True:
        choice = choose(Use("weighted_values", reverse, regular=problem.documents is None), facts)
        if works(choice, problem):
            return choice


def who_skips(problem: Problem, weigher: Choice) -> tuple[Choice, ...]:
    """Who adds what v is skipped by to the outputs that it makes, where v is what they read; or nobody."""
    choice, _ = ask(Use("skipped_outputs", regular=problem.documents is None), weigher.facts)
    served = choice is not None and choice.implementation is weigher.implementation and works(choice, problem)
    return (choice,) if choice is not None and served else ()


def _shares(problem: Problem) -> tuple[int, int, int]:
    """How many heads share one of q, of k and of v."""
    return problem.heads // problem.q_heads, problem.heads // problem.k_heads, problem.heads // problem.v_heads


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
            warn(
                f"leetdist: {choice.name} cannot be compiled for {use.step} of {facts.rows} x {facts.columns} in "
                f"{facts.dtype}; {instead} computes it instead. {' '.join(said)[:1000]}",
                RuntimeWarning,
            )
        return False
    _works.add(key)
    return True


# Not a kernel's fault: the device is full, or lost.
_OF_THE_DEVICE = tuple(
    kind for name in ("OutOfMemoryError", "AcceleratorError") if (kind := getattr(torch, name, None)) is not None
)


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


def backend_of(problem: Problem) -> str:
    """What there is to compute with on this rank, by name and version, before the tile is known."""
    return _backend_of(facts_of(problem, LONG))


def may_fail(backend: str) -> bool:
    """Whether any of it is made by a compiler of kernels, and so may turn out otherwise."""
    return " by " in backend


@lru_cache(maxsize=512)
def _backend_of(facts: Facts) -> str:
    steps = ("tile_outputs", "fleet_outputs", "token_outputs", "fold")
    found = (ask(Use(step), facts)[0] for step in steps)
    return ", ".join(dict.fromkeys(choice.name for choice in found if choice is not None))


LONG = 4096  # tokens of a tile that no implementation finds too short
