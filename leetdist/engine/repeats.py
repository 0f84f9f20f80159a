"""The short way for calls that were made before: those on one device that record no gradient, and the two passes of
compiled graphs.

What such a call launches follows from its options and from how its tensors lie in memory. So one look at those finds
the call that was made before (leetdist.kernels.runtime.replay), and nothing is checked, planned or laid out again.

Tensors: q, k, v, log_decay, initial_state, as callers have them. Options: canonical (leetdist.engine.inputs), in the
order of OPTIONS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from leetdist.arguments import IN_MEMORY
from leetdist.engine import trace
from leetdist.engine.inputs import canonical_tensors
from leetdist.engine.layout import row_major
from leetdist.engine.passes import backward_pass, forward_pass, repeater
from leetdist.engine.plan import Plan
from leetdist.engine.planning import plan_call
from leetdist.engine.values import decays_of, reads_values
from leetdist.kernels.runtime.settings import raw_settings

Given: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
Options: TypeAlias = tuple[float, bool, str, int | None, str | None]

OPTIONS = ("scale", "return_state", "method", "tile", "precision")
COPIED = (
    "leetdist: what the forward op saved for the backward was copied in between, and only one element came "
    "along: hooks that move saved tensors (torch.autograd.graph.save_on_cpu) do not work on compiled calls"
)


def wanted(given: Given, *, read: bool) -> bool:
    """Whether a call without documents is of that kind: no values decide on what it launches. read: as `describe`'s
    read_values."""
    if not possible(given):
        return False
    log_decay = given[3]
    assert log_decay is not None
    if log_decay.ndim != 1:
        return not reads_values(log_decay)
    decays = decays_of(log_decay, read=read)
    return decays is None or decays.bad is None


def possible(given: Given) -> bool:
    """The same where the values of log_decay have been looked at, or nobody does."""
    return are_plain(given[:4]) and (given[4] is None or are_plain(given[4:])) and could_repeat(given[0])


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are tensors of numbers that memory has as they are."""
    for x in tensors:
        if type(x) not in IN_MEMORY or x.layout is not torch.strided or x.is_nested or x.is_neg():  # type: ignore[union-attr]
            return False
    return True


def could_repeat(x: Tensor) -> bool:
    """Whether launches for such a tensor can be recorded and repeated, and nobody watches spans of a call."""
    return _on_gpu(x) and not trace.on() and repeater() is not None


def forward(given: Given, options: Options, *, read: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o, the final state where it is asked for, and the states of the tiles where they have any, in one row."""
    return cast(Any, repeater()(_forward, given, *_key(given, options, read)))


def _forward(*args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    plan, inputs, initial_state = _planned(*args)
    return forward_pass(inputs, initial_state, plan)


def backward(
    given: Given, states: Tensor, do: Tensor | None, dfinal: Tensor | None, options: Options, *, read: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v, None for log_decay's, and that of initial_state. states: one element, in the memory
    of all."""
    size = states.untyped_storage().nbytes()
    do, dfinal = (None if x is None else row_major(x) for x in (do, dfinal))
    return cast(Any, repeater()(_backward, (*given, states, do, dfinal), size, *_key(given, options, read)))


def _backward(*args: Any) -> tuple[Tensor | None, ...]:
    states, do, dfinal, _, *more = args[5:]
    plan, inputs, _ = _planned(*args[:5], *more)
    return backward_pass(
        inputs, whole_states(states, plan), do, dfinal if plan.problem.return_state else None, plan,
        needs_gate_grads=False,
    )  # fmt: skip


def whole_states(states: Tensor, plan: Plan) -> Tensor:
    """All that the forward pass kept, by its first element."""
    problem = plan.problem
    count = problem.batch * problem.heads * plan.tiles.count * problem.dk * problem.dv
    if states.untyped_storage().nbytes() < count * states.element_size():
        raise RuntimeError(COPIED)
    return states.as_strided((count,), (1,)) if count else states[:0]


def _key(given: Given, options: Options, read: bool) -> tuple[Any, ...]:
    """What decides beside how tensors lie."""
    return (*options, read, *[None if x is None else x.device for x in given], *raw_settings())


def _planned(*args: Any) -> tuple[Plan, tuple[Tensor, ...], Tensor | None]:
    q, k, v, log_decay, initial_state = args[:5]
    options = dict(zip(OPTIONS, args[5:10], strict=True))
    plan = plan_call(
        q, k, v, log_decay, initial_state=initial_state, cu_seqlens=None, **options, transport=None,
        read_values=args[10], sees_grads=args[10],  # an op does neither
    )  # fmt: skip
    *inputs, initial_state = canonical_tensors(q, k, v, log_decay, initial_state, None, plan.highest)
    return plan, tuple(inputs), initial_state


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda
