"""One call of an operator: planned, its tokens moved onto the tile grid where documents are packed, computed, and its
outputs moved back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.arguments import for_autograd
from leetdist.engine import ops, repeats
from leetdist.engine.autograd import LinearAttention
from leetdist.engine.inputs import canonical_options, canonical_tensors
from leetdist.engine.layout import contiguous, row_major
from leetdist.engine.passes import forward_pass
from leetdist.engine.planning import WHAT, plan_call
from leetdist.operators.registry import operator_named
from leetdist.sequence.agreement import told
from leetdist.sequence.group import name_of, resolve
from leetdist.sequence.once import check_not_transformed
from leetdist.sequence.shard import redistribute
from leetdist.sequence.site import calling_site

if TYPE_CHECKING:
    from leetdist.sequence.group import Group
    from leetdist.sequence.transport import Transport

# Those that take a log_decay, and its dimensions: which of them a call is, its log_decay says.
DECAYS = {"constant_decay": 1, "token_decay": 3}


def apply_operator(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
    tile: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A registered operator (leetdist.operators.registry), on one device or over a sequence sharded across ranks.

    Args:
        operator: its name.
        q, k, v: as `leetdist.linear_attention` takes them, and all that follows `gates` too.
        gates: the operator's other inputs by name: (B, heads, N, ...) each for its `tokens`, (H, ...) for its `heads`.

    Returns:
        o, (B, H, N, Dv) in q's dtype; or (o, state) with `return_state`.

    Raises:
        ValueError: an argument is wrong or missing, or the ranks disagree; every rank of the group raises.
        RuntimeError: a rank does not answer.

    Source: chunkwise linear attention with a state that travels, as in LASP, arXiv 2404.02882.

    >>> import torch
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> apply_operator("constant_decay", q, k, v, {"log_decay": torch.tensor([-0.01, -0.5])}).shape
    torch.Size([1, 2, 100, 16])
    """
    transport = resolve(group)
    with told(ops.shared(transport, q), WHAT):
        ordered = _ordered(operator, gates)
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
        "method": "auto",
        "tile": tile,
        "precision": None,
    }
    if operator in DECAYS:
        if ops.wanted(q):
            results = ops.linear_attention(q, k, v, ordered["log_decay"], options, name_of(group))
        else:
            results = run((q, k, v, ordered["log_decay"]), options, transport)
    else:
        check_not_transformed(f"operator {operator!r}", *(x for x in (q, k, v) if isinstance(x, Tensor)))
        results = run((q, k, v, None), options, transport, operator=operator, gates=ordered)
    return results if return_state else results[0]


def _ordered(operator: str, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates of an operator in its own order, once they are all there."""
    kind = operator_named(operator)
    names = (*kind.tokens[3:], *kind.heads)
    if not isinstance(gates, Mapping) or set(gates) != set(names):
        got = ", ".join(map(str, gates)) if isinstance(gates, Mapping) else type(gates).__name__
        raise ValueError(f"gates of operator {operator!r} must be {', '.join(names) or 'none'}, got {got}")
    if operator in DECAYS:
        given = gates["log_decay"]
        if isinstance(given, Tensor) and given.ndim != DECAYS[operator]:
            wanted = "(H,)" if operator == "constant_decay" else "(B, H, N)"
            raise ValueError(f"log_decay must have shape {wanted} for operator {operator!r}, got {tuple(given.shape)}")
    return {name: gates[name] for name in names}


def run(
    given: tuple[Tensor, Tensor, Tensor, Tensor | None],
    options: dict[str, Any],
    transport: Transport | None,
    *,
    operator: str | None = None,
    gates: Mapping[str, Tensor] | None = None,
    weight: Tensor | None = None,
    skip: Tensor | None = None,
    gated: bool = False,
    around: tuple[tuple[str, str], ...] = (),
) -> tuple[Tensor, Any]:
    """One call, from arguments to results: o, and the final state, or None where it is not asked for.

    given: q, k, v, log_decay. options: those of `describe`. operator, gates: as for `plan_call`. With a decay a token:
    weight, a factor of each token's v; skip, which needs a weight (leetdist.operators.token_decay has the meaning of
    both); gated, whether the caller adds skip to the outputs itself, beside a gate. around: as `Problem`'s.
    """
    q = given[0]
    if transport is None and gates is None and weight is None and options["cu_seqlens"] is None:
        tensors = *given, options["initial_state"]
        differentiated = torch.is_grad_enabled() and any([getattr(x, "requires_grad", False) for x in tensors])
        if not differentiated and repeats.wanted(tensors, read=True):
            options = canonical_options(**options)
            asked: Any = tuple([options[name] for name in repeats.OPTIONS])
            return repeats.forward(tensors, asked, read=True)[:2]
    if weight is not None:
        options = options | {
            "weighted": True, "skipped": skip is not None, "gated": gated, "around": around,
            "factor_grads": skip is None or skip.ndim == 1,
        }  # fmt: skip
    captured = (
        transport is not None and isinstance(q, Tensor) and q.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    site = None if transport is None else calling_site()
    plan = plan_call(
        *given, **options, transport=transport, captured=captured, site=site, operator=operator, gates=gates
    )
    problem, here, there = plan.problem, plan.given, plan.layout.lengths
    *inputs, initial_state = canonical_tensors(*given, options["initial_state"], options["cu_seqlens"], plan.highest)
    if gates is not None:
        inputs[3:] = [row_major(x) for x in gates.values()]
    if weight is not None:
        fixed = plan.operator.fixed
        more = (x if not fixed else x.detach() for x in (weight, skip) if x is not None)
        inputs.extend(contiguous(x, inputs[3].dtype) for x in more)
    if transport is not None:
        tokens = len(plan.operator.tokens)
        moved = (redistribute(x, 2, here, there, transport) for x in inputs[:tokens])
        inputs[:tokens] = moved
    if not problem.needs_grad and not problem.needs_initial_grad:
        results: Any = forward_pass(tuple(inputs), initial_state, plan)
    else:
        anchor = None
        if not problem.needs_grad and initial_state is None:  # the first rank's needs the gradient
            anchor = torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)
        inputs = [for_autograd(x) for x in inputs]
        results = LinearAttention.apply(initial_state, anchor, plan, *inputs)
    o, state = results[:2]
    if transport is not None:
        o = redistribute(o, 2, there, here, transport)
    return o, state


__all__ = ["apply_operator", "run"]
