"""From a call to its plan: one that is known by all that is looked at, or else the call is checked and, under a group,
agreed on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from leetdist.arguments import is_plain
from leetdist.engine.checks import check_agreement, check_declared, describe, global_layout, lanes_setting
from leetdist.engine.inputs import canonical_options
from leetdist.engine.plan import Plan, make_plan
from leetdist.engine.values import Decays, bad_step, decays_of, never_read
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.settings import raw_settings
from leetdist.operators.dispatch import backend_of, may_fail
from leetdist.operators.problem import Problem, state_dtype
from leetdist.operators.registry import operator_named
from leetdist.sequence.agreement import NOTHING, Agreement, agree, holds
from leetdist.sequence.group import declared_lengths, warn_where_unjoined
from leetdist.sequence.site import Site

if TYPE_CHECKING:
    from leetdist.sequence.transport import Transport

WHAT = "the shapes and arguments of this call"  # that ranks wait for each other for


def plan_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    transport: Transport | None,
    captured: bool = False,
    site: Site | None = None,
    operator: str | None = None,
    gates: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Plan:
    """Check the arguments of one call, agree with the group's other ranks, and plan it. Options: those of `describe`.

    captured: whether a CUDA graph captures the call, and its backward will do with this plan.
    site: the line of the program that makes the call, where that is known.
    operator, gates: another operator than a decay, and its inputs beside q, k and v, by name.

    Raises ValueError, under a group on every rank, if any rank's arguments are wrong or the ranks' do not fit together.
    """
    if transport is None:
        options = canonical_options(**options)
        kind, _, known = _NOTHING if gates is not None else _known(_plans, q, k, v, log_decay, options)
        if known is None:
            warn_where_unjoined()
            problem = _of_operator(describe(q, k, v, log_decay, **options), operator, gates)
            known = _local_plan(
                problem, operator_named(problem.operator).chosen(problem, problem.tokens), raw_settings()
            )
            if kind is not None:
                _plans[kind] = known
        return known
    lengths = declared_lengths(transport)
    kind, decays, known = _NOTHING
    if gates is None:
        more = captured, lengths, lanes_setting()
        kind, decays, known = _known(transport.plans, q, k, v, log_decay, options, transport.cut_from, *more)
    asked: Agreement | None
    asked, plan = known or _NOTHING[:2]
    promised = lengths is not None
    if asked is not None and holds(asked, transport, WHAT, values=_digest(decays), site=site, promised=promised):
        return cast(Plan, plan)
    mine: Problem | ValueError
    try:
        mine = describe(q, k, v, log_decay, **options, rank=transport.rank, ranks=transport.size, sharded=True)
        mine = replace(
            _of_operator(mine, operator, gates),
            backend=backend_of(mine),
            captured=captured,
            sharded_from=transport.cut_from(mine.tokens),
        )
    except ValueError as error:
        mine = error
    else:
        if lengths is not None:
            with transport.call("agreement"):  # the others rely on the promise: who waits for this rank waits in vain
                try:
                    check_declared(mine, lengths, transport.rank)
                except ValueError:
                    transport.tell(NOTHING)
                    raise
    decays = None
    if isinstance(mine, Problem) and log_decay is not None and log_decay.ndim == 1:
        decays = _shared_decays(log_decay, read=options.get("read_values", True))
    agreement = agree(mine, transport, WHAT, values=_digest(decays), site=site, lengths=lengths, asked=asked)
    assert isinstance(mine, Problem)
    plan = _agreed_plan(mine, agreement, transport, decays)
    if kind is not None:
        transport.plans[kind] = agreement, plan
    return plan


def _shared_decays(log_decay: Tensor, *, read: bool) -> Decays | None:
    """Those that all ranks know. Where a call may not read them, what this rank has read before, alone maybe, is no
    help: another has not."""
    return decays_of(log_decay) if read else None


def _digest(decays: Decays | None) -> int:
    return 0 if decays is None else decays.digest


def _agreed_plan(mine: Problem, agreement: Agreement, transport: Transport, decays: Decays | None) -> Plan:
    """This rank's plan of a call that all ranks have agreed on; what follows from that on each is compared once."""
    first = agreement.everyone[0]
    if not agreement.confirmed:
        check_agreement(agreement.everyone)
    planned = mine
    if first.needs_initial_grad != mine.needs_initial_grad:  # every rank has a backward pass then
        planned = replace(mine, needs_initial_grad=True)
    kernels = operator_named(mine.operator).chosen(planned, sum(p.tokens for p in agreement.everyone))
    if not agreement.confirmed and may_fail(mine.backend):
        _confirm(str(kernels), agreement, transport)
    if not agreement.confirmed:
        lengths = tuple(p.tokens for p in agreement.everyone)
        transport.agreements[WHAT, mine, lengths] = agreement  # for calls that `sequence_parallel(lengths=...)` names
        agreement.confirmed = True
    key = decays, kernels
    plan: Plan | None = agreement.memo.get(key)
    if plan is None:
        given, tile = global_layout(agreement.everyone)
        plan = make_plan(
            planned, given.on_grid(tile), tile, transport, decays=decays, given=given.lengths,
            any_initial=first.has_initial, captured=all(problem.captured for problem in agreement.everyone),
        )  # fmt: skip
        rows = plan.layout.batch * mine.dk * mine.dv
        widest = max(lane.width for lane in plan.lanes)
        with transport.call("agreement"):
            transport.reserve(rows * widest * state_dtype(mine.dtype).itemsize, mine.device)
        agreement.memo[key] = plan
    return plan


def _confirm(kernels: str, agreement: Agreement, transport: Transport) -> None:
    """Once a kind of call, ranks compare what they will compute with: what was to be had and could not be compiled,
    only now each knows. (All make a new agreement together.) ValueError, on every rank, where their kernels differ."""
    with transport.call("agreement"):
        everyone = transport.gather_objects(kernels, "the kernels of this call")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                f"the ranks of the group disagree on the kernels of this call: rank {rank} has {theirs}, rank 0 has "
                f"{everyone[0]}"
            )


def _of_operator(problem: Problem, operator: str | None, gates: Mapping[str, Tensor] | None) -> Problem:
    """The problem of an operator that has other inputs beside q, k and v than a log_decay."""
    if operator is None or gates is None:
        return problem
    kind = operator_named(operator)
    shapes = []
    for name, x in gates.items():
        kind.check_gate(name, x, problem)
        shapes.append(tuple(x.shape[3:] if name in kind.tokens else x.shape[1:]))
    learnt = {name for name, x in gates.items() if problem.grad_mode and x.requires_grad}
    return replace(
        problem,
        operator=operator,
        gates=tuple(shapes),
        needs_grad=problem.needs_grad or bool(learnt),
        needs_decay_grad=bool(learnt),
        requires_grad=problem.requires_grad and (*problem.requires_grad, *(name in learnt for name in gates)),
    )


# Plans of local calls by all that `describe` looks at: it takes longer than a short call runs. (Those of a group, with
# what was agreed on, are in Transport.plans.)
_plans: Memo[Hashable, Plan] = Memo(512)


_NOTHING: Any = (None, None, None)


def _known(
    plans: Memo[Hashable, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    options: dict[str, Any],
    cut_from: Callable[[int], int | None] | None = None,
    *more: Hashable,
) -> tuple[Hashable | None, Decays | None, Any]:
    """What tells one call from another, None where values matter that are not known to be good; the values of a decay a
    head; and what there is in `plans`. Written out, because it is a third of what a remembered call costs the host.

    cut_from, more: of calls of a group, for which the values matter too.
    """
    if options["cu_seqlens"] is not None or options["initial_state"] is not None:
        return _NOTHING
    try:
        decay: Hashable = None
        decays = None
        if log_decay is not None:
            if not log_decay.is_floating_point():  # a complex -1 is equal to -1, and would be remembered for it
                return _NOTHING
            read = options.get("read_values", True)
            if log_decay.ndim == 1:
                decays = (decays_of if cut_from is None else _shared_decays)(log_decay, read=read)
                if (read and not never_read(log_decay)) if decays is None else decays.bad is not None:
                    return _NOTHING
            elif not is_plain(log_decay) or bad_step(log_decay, read=read) is not None:
                return _NOTHING
            decay = (
                type(log_decay), log_decay.layout, log_decay.shape, log_decay.dtype, log_decay.device,
                log_decay.requires_grad,
            )  # fmt: skip
        if cut_from is not None:
            options, more = canonical_options(**options), (decays, cut_from(q.shape[2]), *more)
        kind = (
            type(q), q.layout, q.shape, q.dtype, q.device, q.requires_grad,
            type(k), k.layout, k.shape, k.dtype, k.device, k.requires_grad,
            type(v), v.layout, v.shape, v.dtype, v.device, v.requires_grad,
            decay, torch.is_grad_enabled(), *options.items(), *raw_settings(), *more,
        )  # fmt: skip
        return kind, decays, plans.get(kind)
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError):  # describe says what is wrong
        return _NOTHING


@lru_cache(maxsize=512)
def _local_plan(problem: Problem, _chosen: Hashable, _settings: Hashable) -> Plan:
    """Layers and steps come with the same few problems. A plan is for one choice of kernels and settings: what is
    remembered by the plan (leetdist.kernels.runtime.replay) is."""
    layout, tile = global_layout([problem])
    return make_plan(problem, layout, tile, any_initial=problem.has_initial)
