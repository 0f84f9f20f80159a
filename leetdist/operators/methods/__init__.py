"""The local methods: how one rank computes its tiles. What happens between tiles and ranks is the same for all.

A method's module names the step that its outputs are (leetdist.operators.implementations.CANDIDATES), as `OUTPUTS`, and
may build on it, by `composed(kernels)`; those for one device have `attention` instead.
"""

from __future__ import annotations

import importlib
import itertools
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from leetdist.arguments import autocasts, for_autograd, without_autocast
from leetdist.kernels.constant_decay.pytorch.walk import LEAST
from leetdist.kernels.runtime.settings import raw_settings
from leetdist.operators import cost
from leetdist.operators.choice import Use
from leetdist.operators.composition import Kernels, compose
from leetdist.operators.dispatch import ask, chosen, facts_of
from leetdist.operators.problem import Problem, state_dtype
from leetdist.sequence.grid import default_tile


def kernels_for(problem: Problem, tokens: int) -> Kernels:
    """The kernels of the problem's method on its device; `tokens` are those of all ranks."""
    return _kernels_for(problem, tokens, raw_settings())


@lru_cache(maxsize=512)
def _kernels_for(problem: Problem, tokens: int, _settings: tuple[str | None, ...]) -> Kernels:
    method = problem.method
    if method == "auto":
        method = method_for(problem, tokens).method
    module = importlib.import_module(f"leetdist.operators.methods.{method}")
    build = getattr(module, "composed", None)
    kernels = compose(module.OUTPUTS, problem, problem.tile or default_tile(tokens), alone=build is None)
    return kernels if build is None else cast(Kernels, build(kernels))


def method_for(problem: Problem, tokens: int) -> cost.MethodChoice:
    """What "auto" takes, by the costs of the kernels that will run."""
    tile = problem.tile or default_tile(tokens)
    if problem.operator != "constant_decay":
        return cost.MethodChoice("block", {}, {"block": 1.0}, "")
    if problem.device.type == "cpu":
        return cost.choose(problem, tile, where="cpu", token_scan=True)
    where = chosen(Use("tile_outputs"), problem, tile, compiled=True).implementation.costs
    where = "sm_90" if where == "sm_90" else "general"
    found = cost.choose(problem, tile, where=where, token_scan=_token_scan(problem, tile, compiled=False))
    if found.method in cost.BY_TOKEN and not _token_scan(problem, tile, compiled=True):
        return cost.choose(problem, tile, where=where, token_scan=False)
    return found


def _token_scan(problem: Problem, tile: int, *, compiled: bool) -> bool:
    """Whether the kernels of CUDA C++ can run with which the methods that go token by token were measured."""
    choice, _ = ask(Use("fleet_outputs"), facts_of(problem, tile))
    if compiled and choice is not None:
        choice = chosen(choice.use, problem, tile, compiled=True)
    return choice is not None and choice.implementation.compiler == "NVRTC"


def attention_on_one_device(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Any]:
    """`linear_attention` of a method that knows no tiles: o, and the final states or None. Document after document."""
    from leetdist.operators.methods import recursion, vanilla  # by name, which torch.compile follows

    method = {"vanilla": vanilla, "recursion": recursion}[problem.method]
    if problem.needs_grad or problem.needs_initial_grad:
        q, k, v = for_autograd(q), for_autograd(k), for_autograd(v)
        log_decay = None if log_decay is None else for_autograd(log_decay)
        initial_state = None if initial_state is None else for_autograd(initial_state)
    dtype = state_dtype(problem.dtype)
    decay = q.new_zeros(problem.heads) if log_decay is None else log_decay
    plain = without_autocast(q.device) if autocasts(q.device) else nullcontext()
    with plain:
        decay = decay.to(dtype)
        if decay.ndim == 3:  # whose values nobody may have read
            decay = torch.where(decay <= 0, decay, torch.nan)
        decay = decay.clamp_min(LEAST)
        q, k, v = (_for_all_heads(x.to(dtype), problem.heads) for x in (q, k, v))
        rows, spans = [initial_state], [(0, problem.tokens)]
        if problem.documents is not None:
            spans = list(itertools.pairwise(problem.documents))
            rows = [None] * len(spans) if initial_state is None else list(initial_state.split(1))
        outputs, states = [], []
        for (begin, end), row in zip(spans, rows, strict=True):
            q_i, k_i, v_i = (q, k, v) if len(spans) == 1 else (x[:, :, begin:end] for x in (q, k, v))
            g_i = decay if decay.ndim == 1 or len(spans) == 1 else decay[:, :, begin:end]
            outputs.append(method.attention(q_i, k_i, v_i, g_i, row))
            if problem.return_state:
                states.append(vanilla.state_after(k_i, v_i, g_i, row))
        o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        state = torch.cat(states) if len(states) > 1 else states[0] if states else None
    return (problem.scale * o).to(problem.dtype), state


def _for_all_heads(x: Tensor, heads: int) -> Tensor:
    share = heads // x.shape[1]
    return x.contiguous() if share == 1 else x.repeat_interleave(share, 1)
