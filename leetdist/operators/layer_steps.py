"""Who computes what layers do around their attention: chosen from the table of leetdist.operators.implementations, as
the kernels of the attention are.

Its operator is "mamba" there; `columns` is what a step's kernels are compiled for: a head's channels, a convolution's
taps, the channels that a norm is over.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from leetdist.arguments import in_memory, is_memory
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.settings import raw_settings
from leetdist.operators.choice import Choice, Use
from leetdist.operators.dispatch import LONG, chosen
from leetdist.operators.problem import Problem

OPERATOR = "mamba"
_choices: Memo[Hashable, Choice] = Memo(512)


def kernel(pytorch: Callable[..., Any], like: Tensor, columns: int) -> Callable[..., Any]:
    """Who computes the step that PyTorch's function `pytorch` is, for tensors like `like`. While a graph is traced,
    that function itself, of which the compiler makes kernels of its own."""
    if torch.compiler.is_compiling() or not is_memory(like):
        return pytorch
    choice = choice_for(pytorch.__name__, like.device, like.dtype, columns)
    function = choice.function()
    if not choice.implementation.compiler:
        return function
    return lambda *given, **more: function(*(in_memory(x)[0] if isinstance(x, Tensor) else x for x in given), **more)


def choice_for(step: str, device: torch.device, dtype: torch.dtype, columns: int) -> Choice:
    """Who computes a step, and why nobody before it."""
    key = step, device, dtype, columns, raw_settings()
    found = _choices.get(key)
    if found is None:
        problem = Problem(
            batch=1, q_heads=1, k_heads=1, v_heads=1, dk=columns, dv=columns, dtype=dtype, device=device, scale=1.0,
            method="auto", tile=None, documents=None, has_decay=True, return_state=False, grad_mode=True,
            needs_grad=True, needs_initial_grad=False, needs_decay_grad=True, has_initial=False, tokens=1,
            operator=OPERATOR,
        )  # fmt: skip
        found = _choices[key] = chosen(Use(step), problem, LONG, compiled=True)
    return found


__all__ = ["choice_for", "kernel"]
