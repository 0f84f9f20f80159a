"""The gradients of a call's inputs, made by the operator and put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from leetdist.engine import scan, trace
from leetdist.engine.filling import LaneStates, LaneTokens, in_order, kinds_of_tiles
from leetdist.engine.lanes import Lane, index_of
from leetdist.engine.plan import Plan

Given = Mapping[str, Tensor]


class Gradients:
    """Lane by lane those of tokens: the early ones, which need no gradients of states, and the late ones. Then those of
    heads. Heads that share an input add up, in fp32, in the order of the heads.

    needs_gate_grads: of more inputs than q, k and v. x: a lane's inputs by name; do: its part of do; states, ends: the
    state at each tile's start, and the gradient of that at its end.
    """

    def __init__(self, inputs: tuple[Tensor, ...], dtype: torch.dtype, plan: Plan, *, needs_gate_grads: bool) -> None:
        """dtype: of the states."""
        self.inputs, self.plan, self.needs_gate_grads = inputs, plan, needs_gate_grads
        self.operator = operator = plan.operator
        given_as = dict(zip(operator.tokens, inputs, strict=False))
        wanted = tuple(operator.tokens if needs_gate_grads else operator.tokens[:3])
        wanted = tuple(name for name in wanted if name not in operator.fixed)
        if needs_gate_grads:
            given_as |= {name: given_as[like] for name, like in operator.by_token.items()}
            wanted += tuple(operator.by_token)
        self.late = tuple(name for name in wanted if name not in operator.early)
        self.tokens = {name: LaneTokens(given_as[name], dtype, plan) for name in wanted}
        self.dtypes = {name: grad.wide for name, grad in self.tokens.items()}
        # What early gradients leave for late ones, and these for those of heads, of each kind of tiles.
        self.kept: dict[tuple[Lane, int], dict[str, Tensor]] = {}

    def add_early(self, lane: Lane, x: Given, do: Tensor, states: LaneStates) -> None:
        self._add(self.operator.early, self.operator.early_gradients, lane, x, do, states)

    def add_late(self, lane: Lane, x: Given, do: Tensor, states: LaneStates, ends: LaneStates) -> None:
        self._add(self.late, self.operator.late_gradients, lane, x, do, states, ends, takes_kept=True)

    def _add(
        self,
        names: tuple[str, ...],
        compute: Callable[..., dict[str, Tensor]],
        lane: Lane,
        x: Given,
        do: Tensor,
        *at_tiles: LaneStates,
        takes_kept: bool = False,
    ) -> None:
        with trace.span(", ".join(f"d{name}" for name in names), self.plan.rank, lane, self.inputs[0]):
            own = {name: self.tokens[name].place(lane) for name in names}
            for kind, (tiles, from_states) in enumerate(kinds_of_tiles(self.plan, lane, *at_tiles)):
                more: dict[str, Any] = {"kept": self.kept.pop((lane, kind), {})} if takes_kept else {}
                found = compute(x, *from_states, do, tiles, own, self.dtypes, **more)
                own |= {name: found.pop(name) for name in names}
                self.kept[lane, kind] = found
            for name in names:
                grad = own[name]
                assert grad is not None
                self.tokens[name].put(lane, grad)

    def of_tokens(self) -> list[Tensor | None]:
        """In the operator's order; None for those that are not wanted."""
        return [self.tokens[name].whole if name in self.tokens else None for name in self.operator.tokens]

    def of_heads(
        self, x: Mapping[Lane, Given], do: Mapping[Lane, Tensor], states: LaneStates, ends: LaneStates
    ) -> list[Tensor | None]:
        """The same of the operator's `heads`, on the first rank; of those `by_token` what tokens add here."""
        operator, plan = self.operator, self.plan
        grads: list[Tensor | None] = [None] * len(operator.heads)
        if not self.needs_gate_grads:
            return grads
        if set(operator.heads) - set(operator.fixed) - set(operator.by_token):
            shares = {
                lane: [
                    operator.head_gradients(x[lane], start, end, do[lane], tiles, kept=self.kept[lane, kind])
                    for kind, (tiles, (start, end)) in enumerate(kinds_of_tiles(plan, lane, states, ends))
                ]
                for lane in plan.lanes
            }
            for place, name in enumerate(operator.heads):
                added = in_order(
                    {lane: _of_every_tile([own[name] for own in share], plan) for lane, share in shares.items()}, plan
                )
                like = self.inputs[len(operator.tokens) + place]
                grads[place] = scan.head_gradient_to_first(added, like, name, plan)
        for name in operator.by_token:
            grads[operator.heads.index(name)] = self.tokens[name].whole
        return grads


def _of_every_tile(kinds: list[Tensor], plan: Plan) -> Tensor:
    """What each tile adds, (B, heads, tiles, ...) of each kind of tiles, in the order of the row."""
    if len(kinds) == 1:
        return kinds[0]
    assert plan.alone is not None
    number_of = {start: number for number, (start, _) in enumerate(plan.every_tile.spans)}
    whole = kinds[0].new_empty(*kinds[0].shape[:2], len(number_of), *kinds[0].shape[3:])
    for tiles, own in zip((plan.tiles, plan.alone), kinds, strict=True):
        whole[:, :, index_of(tuple(number_of[start] for start, _ in tiles.spans), own.device)] = own
    return whole
