"""A decay that is one number a head, the same for all tokens or not: `S_t = gamma_t S_{t-1} + k_t v_t^T`.

The backward pass needs no kernel of its own, but for the decays' gradient. With `LA(a, b, c)_i = sum_{j<=i} w_ij
(a_i . b_j) c_j`, where w_ij is the product of gamma_{j+1} to gamma_i, S the state at each tile's start and R the
gradient of the state at its end:

    o  = LA(q, k, v; S)                    summaries of (k, v)
    dq = LA(do, v, k; S^T)                 state gradients: summaries of (q, do), reversed
    dk = LA(v, do, q; R^T), reversed       dv = LA(k, q, do; R), reversed

Source: LeetDecoding, arXiv 2501.02573; RetNet, arXiv 2307.08621, eqs. 5 to 7; a decay a token: Mamba-2, arXiv
2405.21060, section 6.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.kernels.common.memory import are_zeros
from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.base import Dtypes, Inputs, Operator, Places
from leetdist.operators.composition import part_of_tile
from leetdist.operators.methods import kernels_for

if TYPE_CHECKING:
    from leetdist.kernels.common.hop import Hop
    from leetdist.operators.problem import Problem


class ScalarDecay(Operator):
    """Inputs q, k, v and log_decay; the kernels are those of the problem's operator and method on its device."""

    early = ("q",)

    def __init__(self, problem: Problem, tokens: int) -> None:
        self.kernels = kernels_for(problem, tokens)
        self.launches_alone = self.kernels.recordable
        self.scale, self.dtype = problem.scale, problem.dtype
        self.writes_into_places = self.kernels.writes_into_places
        self.folds_between = self.kernels.folds_between
        self.walks_rows = self.kernels.row_outputs is not None

    @classmethod
    def chosen(cls, problem: Problem, tokens: int) -> Hashable:
        return kernels_for(problem, tokens)

    def part_of_tile(self, tile: int) -> int:
        return part_of_tile(self.kernels.longest_tile, tile)

    def transitions(self, x: Inputs, tiles: Tiles) -> Tensor:
        return self.kernels.transitions(x["log_decay"], tiles)

    def summaries(self, x: Inputs, tiles: Tiles, *, to_end: bool, out: Tensor | None) -> Tensor:
        return self.kernels.tile_states(
            x["k"], x["v"], x["log_decay"], tiles, reverse=False, to_end=to_end, **_into(out), **told(x, "weight")
        )

    def fold(
        self,
        keep: Tensor,
        states: Tensor,
        initial: Tensor | None,
        tiles: Tiles,
        *,
        reverse: bool,
        to_end: bool,
        hop: Hop | None = None,
    ) -> Tensor | None:
        more = {} if hop is None else {"hop": hop}
        return self.kernels.fold(states, initial, keep, tiles, reverse=reverse, to_end=to_end, **more)

    def outputs(self, x: Inputs, states: Tensor, tiles: Tiles, *, out: Tensor | None) -> Tensor:
        return self._outputs(x["q"], x["k"], x["v"], states, x, tiles, self.dtype, out, **told(x, "weight", "skip"))

    def state_gradients(
        self, x: Inputs, states: Tensor, do: Tensor, tiles: Tiles, *, to_end: bool, out: Tensor | None
    ) -> Tensor:
        return self.kernels.tile_states(
            x["q"], do, x["log_decay"], tiles, reverse=True, scale=self.scale, to_end=to_end, **_into(out)
        )

    def early_gradients(
        self, x: Inputs, states: Tensor, do: Tensor, tiles: Tiles, places: Places, dtypes: Dtypes
    ) -> dict[str, Tensor]:
        if self.kernels.early_gradients is not None:
            dq, kept = self.kernels.early_gradients(
                x["q"], x["k"], x["v"], do, states, x["log_decay"], tiles,
                scale=self.scale, out=places["q"], **told(x, "weight"),
            )  # fmt: skip
            return {"q": dq, **kept}
        more = self._added_up(x["q"])
        dq = self._outputs(do, x["v"], x["k"], states, x, tiles, dtypes["q"], places["q"], transposed=True, **more)
        return {"q": dq}

    def late_gradients(
        self,
        x: Inputs,
        states: Tensor,
        ends: Tensor,
        do: Tensor,
        tiles: Tiles,
        places: Places,
        dtypes: Dtypes,
        *,
        kept: Inputs,
    ) -> dict[str, Tensor]:
        if self.kernels.late_gradients is not None:
            names = dict.fromkeys(("k", "v", "log_decay", *places))
            grads = self.kernels.late_gradients(
                x["q"], x["k"], x["v"], do, states, ends, x["log_decay"], tiles, kept,
                scale=self.scale, outs=tuple(places.get(name) for name in names), **told(x, "weight", "skip"),
            )  # fmt: skip
            return dict(zip(names, grads, strict=True))

        def reversed_outputs(name: str, a: Tensor, b: Tensor, c: Tensor, *, transposed: bool) -> Tensor:
            more = self._added_up(x[name]) | {"reverse": True, "transposed": transposed}
            return self._outputs(a, b, c, ends, x, tiles, dtypes[name], places[name], **more)

        dk = reversed_outputs("k", x["v"], do, x["q"], transposed=True)
        dv = reversed_outputs("v", x["k"], x["q"], do, transposed=False)
        return {"k": dk, "v": dv}

    def _outputs(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        states: Tensor,
        x: Inputs,
        tiles: Tiles,
        out_dtype: torch.dtype,
        out: Tensor | None,
        *,
        reverse: bool = False,
        transposed: bool = False,
        **more: Any,
    ) -> Tensor:
        """LA(a, b, c; states), or `transposed` of them."""
        options: dict[str, Any] = {"scale": self.scale, "state_scale": 1.0 if reverse else self.scale, **_into(out)}
        if self.kernels.row_outputs is not None and are_zeros(states):
            options |= {"transposed": transposed, "sum_scale": self.scale if reverse else 1.0}
            return self.kernels.row_outputs(a, b, c, x["log_decay"], tiles, reverse=reverse, **options)
        states = states.mT if transposed else states
        options |= {"out_dtype": out_dtype, **more}
        return self.kernels.tile_outputs(a, b, c, states, x["log_decay"], tiles, reverse=reverse, **options)

    def _added_up(self, x: Tensor) -> dict[str, Any]:
        """What kernels that can add up gradients of x over heads are told."""
        return {"heads": x.shape[1]} if self.kernels.adds_up else {}

    def decay_gradient(
        self, x: Inputs, states: Tensor, ends: Tensor, do: Tensor, tiles: Tiles, *, out: Tensor | None = None
    ) -> Tensor:
        """As the kernels give it: a number a tile; or a token, then in `out` if given."""
        return self.kernels.decay_gradient(
            x["q"], x["k"], x["v"], do, states, ends, x["log_decay"], tiles, scale=self.scale, **_into(out)
        )

    def head_gradients(
        self, x: Inputs, states: Tensor, ends: Tensor, do: Tensor, tiles: Tiles, *, kept: Inputs
    ) -> dict[str, Tensor]:
        if self.kernels.late_gradients is not None:
            return {name: kept[name] for name in self.heads}
        return {name: self.decay_gradient(x, states, ends, do, tiles) for name in self.heads}


def told(x: Inputs, *names: str) -> dict[str, Any]:
    """Those that kernels are to take beside q, k, v and log_decay (leetdist.operators.token_decay)."""
    return {name: x[name] for name in names if name in x}


def _into(out: Tensor | None) -> dict[str, Any]:
    """`out=` where there is one: not every method's kernels know it."""
    return {} if out is None else {"out": out}
