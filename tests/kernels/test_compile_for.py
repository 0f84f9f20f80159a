"""What the dispatch calls to compile a kernel before the first call of a kind: every module that has it takes it so."""

from __future__ import annotations

import inspect

import pytest
import torch

from leetdist.operators import layer_steps
from leetdist.operators.choice import Choice, Use
from leetdist.operators.dispatch import facts_of
from leetdist.operators.implementations import CANDIDATES, CUDA_HOPPER, CUDA_HOPPER_A_TOKEN
from leetdist.operators.problem import Problem
from leetdist.operators.rehearsal import rehearse

ALL = [(step, candidate) for step, candidates in CANDIDATES.items() for candidate in candidates if candidate.compiler]


def problem_of(operator: str, dk: int, dv: int) -> Problem:
    return Problem(
        batch=1, q_heads=2, k_heads=2, v_heads=4, dk=dk, dv=dv, dtype=torch.bfloat16, device=torch.device("cpu"),
        scale=1.0, method="auto", tile=None, documents=None, has_decay=True, return_state=False, grad_mode=True,
        needs_grad=True, needs_initial_grad=False, needs_decay_grad=True, has_initial=False, tokens=1,
        operator=operator,
    )  # fmt: skip


@pytest.mark.parametrize(("step", "candidate"), ALL, ids=lambda x: x if isinstance(x, str) else x.module)
def test_takes_what_a_rehearsal_gives(step: str, candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        module = candidate.loaded()
    except ImportError as error:
        pytest.skip(str(error))
    if not hasattr(module, "compile_for"):
        pytest.skip("is launched itself")
    seen = []

    def compile_for(
        step: str, rows: int, columns: int, dtype: torch.dtype, wide: bool, reverse: bool, programs: int, device,
        **more: object,
    ) -> None:  # fmt: skip
        seen.append((step, rows, columns, dtype, wide, reverse, programs, device, more))

    problem = problem_of(candidate.operator, 64, 64)
    original = module.compile_for
    monkeypatch.setattr(module, "compile_for", compile_for)
    rehearse(Choice(Use(step), facts_of(problem, 128), candidate, ()), problem)
    *given, more = seen[0]
    inspect.signature(original).bind(*given, **more)


@pytest.mark.parametrize("candidate", [CUDA_HOPPER, CUDA_HOPPER_A_TOKEN], ids=lambda x: x.operator)
def test_blocks_of_rows_are_rehearsed_each(candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last in fp32, and all but the first added to the others."""
    seen = []
    module = candidate.loaded()
    monkeypatch.setattr(
        module, "compile_for",
        lambda step, rows, columns, dtype, wide, *_, onto: seen.append((step, rows, columns, wide, onto)),
    )  # fmt: skip
    problem = problem_of(candidate.operator, 576, 96)
    rehearse(Choice(Use("tile_outputs"), facts_of(problem, 128), candidate, ()), problem)
    kinds = [(64, 2, False), (256, 2, True), (256, False, True)]
    assert seen == [("tile_outputs", rows, 96, wide, onto) for rows, wide, onto in kinds]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "step", [step for step, them in CANDIDATES.items() if them[0].operator == layer_steps.OPERATOR]
)
def test_steps_around_the_attention_are_not_passed_over(step: str) -> None:
    columns = 4 if "convolution" in step else 64
    choice = layer_steps.choice_for(step, torch.device("cuda", 0), torch.bfloat16, columns)
    assert choice.implementation.compiler == "Triton", choice.refused
