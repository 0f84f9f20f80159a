"""From a problem to who computes what: the operator, the tiles of this rank, where the tokens lie, and which heads go
together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from leetdist.arguments import is_plain
from leetdist.engine.checks import check_agreement, check_declared, describe, global_layout, lanes_setting
from leetdist.engine.inputs import canonical_options
from leetdist.engine.lanes import Lane, make_lanes
from leetdist.engine.values import Decays, bad_step, decays_of, forgetting_bound, unread
from leetdist.kernels.common.memo import Memo
from leetdist.kernels.common.memory import zero_states
from leetdist.kernels.common.settings import raw_settings
from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.base import Operator
from leetdist.operators.dispatch import backend_of, may_fail
from leetdist.operators.problem import Problem, state_dtype
from leetdist.operators.registry import operator_named
from leetdist.sequence.agreement import NOTHING, Agreement, agree, holds
from leetdist.sequence.grid import Layout
from leetdist.sequence.group import declared_lengths, warn_where_unjoined
from leetdist.sequence.pipeline import best_lanes
from leetdist.sequence.site import Site

if TYPE_CHECKING:
    from leetdist.sequence.transport import Transport


WHAT = "the shapes and arguments of this call"  # that ranks wait for each other for


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that the two passes need beside tensors."""

    problem: Problem
    operator: Operator
    layout: Layout
    # Tiles that take over a state, or hand one on; and those of sequences that have none, mostly a tile each.
    tiles: Tiles
    alone: Tiles | None
    lanes: tuple[Lane, ...]
    rank: int = 0
    transport: Transport | None = None
    any_initial: bool = False
    any_initial_grad: bool = False
    # Heads that forget in one tile, and in one token (leetdist.engine.scan).
    forgetting: frozenset[int] = frozenset()
    mute: frozenset[int] = frozenset()
    # Tokens on each rank as the caller has them, before they are aligned to the grid.
    given: tuple[int, ...] = field(default=())

    @cached_property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the initial and the final state of the whole call."""
        return self.layout.num_states, self.problem.heads, self.problem.dk, self.problem.dv

    @property
    def linked(self) -> bool:
        """Whether any tile here takes over a state or hands one on (or there is none)."""
        return self.alone is None or self.tiles.num_segments > 0

    @cached_property
    def every_tile(self) -> Tiles:
        """Linked or alone, in the order of the row."""
        return self.tiles if self.alone is None else Tiles(self.tiles.size, self.tiles.bounds)

    @cached_property
    def learning(self) -> Plan:
        """The same where the gradient of what the operator decays by is asked for: of a compiled call that is known in
        its backward pass alone."""
        if self.problem.needs_decay_grad:
            return self
        problem = replace(self.problem, needs_decay_grad=True)
        return replace(self, problem=problem, operator=type(self.operator)(problem, self.layout.offsets[-1]))

    def zero_states(self, lane: Lane) -> Tensor:
        """(B, lane's heads, tiles that are alone, Dk, Dv), without memory: the states from which they start and end."""
        assert self.alone is not None
        problem = self.problem
        shape = problem.batch, lane.width, self.alone.count, problem.dk, problem.dv
        return zero_states(shape, state_dtype(problem.dtype), problem.device)

    @cached_property
    def repeatable(self) -> bool:
        """Whether a pass may be nothing but launches, whose host work is done once a kind of call."""
        return self.problem.device.type == "cuda" and self.operator.launches_alone

    def to_end(self, *, reverse: bool) -> bool:
        """Whether anybody reads what the last tile of the scan adds: the next rank, or who asked for the state at the
        end. (If there are several sequences here, only the last could go without; it does not.)"""
        if not self.tiles.regular:
            return True
        if reverse:
            return self.layout.continues_from_left(self.rank) or self.any_initial
        return self.layout.continues_to_right(self.rank) or self.problem.return_state

    @cached_property
    def highest(self) -> tuple[float, ...] | None:
        """The largest log-decay of each head for which the plan is right; None where it is for all, because no lane
        forgets and no head is mute. (Half a unit over the bound: exp of that is 0 too.)"""
        forget = {head for lane in self.lanes if lane.forgets for head in range(lane.total)[lane.heads]}
        if not forget and not self.mute:
            return None
        bound = forgetting_bound(self.problem.dtype) + 0.5
        return tuple(
            bound if head in self.mute else bound / self.tiles.size if head in forget else 0.0
            for head in range(self.problem.heads)
        )

    def sent_bytes(self) -> int:
        """Bytes of states that this rank sends in the forward scan."""
        if self.transport is None or not self.layout.continues_to_right(self.rank):
            return 0
        heads = sum(len(lane.sent) for lane in self.lanes)
        size = state_dtype(self.problem.dtype).itemsize
        return self.layout.batch * heads * self.problem.dk * self.problem.dv * size

    def hops(self) -> tuple[int, ...]:
        """How many hops the longest chain of each head has: as many as there are neighbours, 1 where a full tile is
        enough to forget, 0 for a mute head."""
        chain = 0 if self.transport is None else self.transport.size - 1
        return tuple(
            0 if h in self.mute else min(chain, 1) if h in self.forgetting else chain for h in range(self.problem.heads)
        )


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
        decays = decays_of(log_decay, read=options.get("read_values", True))
    agreement = agree(mine, transport, WHAT, values=_digest(decays), site=site, lengths=lengths, asked=asked)
    assert isinstance(mine, Problem)
    plan = _agreed_plan(mine, agreement, transport, decays)
    if kind is not None:
        transport.plans[kind] = agreement, plan
    return plan


def _digest(decays: Decays | None) -> int:
    return 0 if decays is None else decays.digest


def _agreed_plan(mine: Problem, agreement: Agreement, transport: Transport, decays: Decays | None) -> Plan:
    """This rank's plan of a call that all ranks have agreed on; what follows from that on each is compared once."""
    if not agreement.confirmed:
        check_agreement(agreement.everyone)
    kernels = operator_named(mine.operator).chosen(mine, sum(p.tokens for p in agreement.everyone))
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
            mine, given.on_grid(tile), tile, transport, decays=decays, given=given.lengths,
            any_initial=agreement.everyone[0].has_initial, any_initial_grad=agreement.everyone[0].needs_initial_grad,
            captured=all(problem.captured for problem in agreement.everyone),
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
                decays = decays_of(log_decay, read=read)
                if (read and not unread(log_decay)) if decays is None else decays.bad is not None:
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
    remembered by the plan (leetdist.kernels.common.replay) is."""
    layout, tile = global_layout([problem])
    return make_plan(problem, layout, tile, any_initial=problem.has_initial)


def make_plan(
    problem: Problem,
    layout: Layout,
    tile: int,
    transport: Transport | None = None,
    *,
    decays: Decays | None = None,
    any_initial: bool,
    any_initial_grad: bool = False,
    captured: bool = False,
    given: tuple[int, ...] = (),
) -> Plan:
    """The plan of one rank; `layout` has its boundaries on the grid of `tile`."""
    rank = 0 if transport is None else transport.rank
    operator = operator_named(problem.operator)(problem, layout.offsets[-1])
    tile = operator.part_of_tile(tile)
    tiles, alone = _linked_and_alone(layout, rank, tile, problem, operator, any_initial)
    forgetting = frozenset(() if decays is None else decays.forgetting(tile, problem.dtype))
    # Where the last ranks hold no tokens, the state at the end and its gradient cross them, multiplied by nothing.
    crossed = layout.documents is None and layout.lengths[-1] == 0
    mute = frozenset(() if decays is None or crossed else decays.forgetting(1, problem.dtype))
    lanes = 1
    if transport is not None and operator.writes_into_places:
        lanes = problem.lanes or best_lanes(
            layout.batch, problem.heads, problem.apart, problem.dk, problem.dv, layout.lengths, tile,
            problem.device.type, forgetting=len(forgetting) / problem.heads,
            captured=captured and not mute,  # their indices are copied to the GPU, which no graph may do
        )  # fmt: skip
    return Plan(
        problem=problem,
        operator=operator,
        layout=layout,
        tiles=tiles,
        alone=alone,
        lanes=make_lanes(problem.heads, problem.apart, lanes, forgetting, mute),
        rank=rank,
        transport=transport,
        any_initial=any_initial,
        any_initial_grad=any_initial_grad,
        forgetting=forgetting,
        mute=mute,
        given=given or layout.lengths,
    )


def _linked_and_alone(
    layout: Layout, rank: int, tile: int, problem: Problem, operator: Operator, any_initial: bool
) -> tuple[Tiles, Tiles | None]:
    """A sequence of one tile needs no states where none is given or returned: 5,000 packed documents in 131,072 tokens
    had 10 GB of them. With kernels that walk a sequence tile by tile none does."""
    tiles = layout.tiles(rank, tile)
    if any_initial or problem.return_state:
        return tiles, None
    last = tiles.num_segments - 1
    linked = {0} if layout.continues_from_left(rank) else set()
    linked |= {last} if layout.continues_to_right(rank) else set()
    rest, alone = tiles.parted(linked, several=operator.walks_rows)
    # Two kinds of tiles take two launches, of which the second writes beside what the first has written.
    if not alone.count or (rest.count and not operator.writes_into_places):
        return tiles, None
    return rest, alone
