"""Kernels tried before they compute: compiled as a call will ask for them, and launched once where that needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.choice import Choice

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem

TOKENS = 16  # of the launch that a kernel is tried with


def rehearse(choice: Choice, problem: Problem) -> None:
    """Compile what a choice will launch for such a problem; raises what the compiler raises. A module that has
    `compile_for` does it by that, any other's function is called on a few tokens of zeros."""
    if choice.facts.interpreted:
        return
    compile_for = getattr(choice.implementation.loaded(), "compile_for", None)
    if compile_for is None:
        _launch(choice, problem)
    else:
        _compile(choice, problem, compile_for)


def _compile(choice: Choice, problem: Problem, compile_for: Callable[..., None]) -> None:
    facts, use, device = choice.facts, choice.use, problem.device
    programs = facts.sequences[0] or problem.batch * problem.heads * max(1, problem.tokens // facts.tile)
    if len(choice.blocks) == 1:
        share = problem.heads // min(problem.q_heads, problem.k_heads, problem.v_heads)
        options = facts.dtype, int(use.wide), use.reverse, programs, device
        walk = {"transposed": use.transposed, "tile": facts.tile} if use.step == "row_outputs" else {}
        compile_for(use.step, facts.rows, facts.columns, *options, share=share, **walk)
        return
    for begin, end in choice.blocks:
        options = facts.dtype, 2 if end < facts.rows else int(use.wide), use.reverse, programs, device
        compile_for(use.step, end - begin, facts.columns, *options, onto=begin > 0)


def _launch(choice: Choice, problem: Problem) -> None:
    facts, use = choice.facts, choice.use
    device, heads = problem.device, problem.heads
    q_heads, k_heads, v_heads = problem.q_heads, problem.k_heads, problem.v_heads
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
        elif use.step == "weighted_values":
            function(tokens(v_heads, columns), decay[:, :v_heads])
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
