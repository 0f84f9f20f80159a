"""What an operator is: a recurrence `S_t = A_t S_{t-1} + k_t v_t^T`, `o_t = scale * q_t^T S_t`, seen tile by tile.

The engine (leetdist.engine) knows tiles, ranks and the order of the fold; an operator knows what a tile does to the
state before it and what it says with it. So an operator is written once, for one tile, and has sequence parallelism,
packed documents, autograd and the exactness contract from the engine.

`Operator` is what the engine calls, on whole rows of tiles and lane by lane: where there are kernels, they stand behind
it (leetdist.operators.constant_decay). `TileOperator` gives all of it from three functions of one tile in PyTorch, and
gradients by autograd of one tile: what a new operator starts from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.problem import state_dtype

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem

Inputs = Mapping[str, Tensor]
Places = Mapping[str, Tensor | None]
Dtypes = Mapping[str, torch.dtype]


class Operator(ABC):
    """One operator for one problem. Inputs come by name: `tokens` (B, heads, N, ...), of which q, k and v are the first
    three and any may have fewer heads than the widest, and `heads` (H, ...), one entry a head."""

    tokens: tuple[str, ...] = ("q", "k", "v")
    heads: tuple[str, ...] = ()
    # Those of both that have no gradient.
    fixed: tuple[str, ...] = ()
    # Those of `heads` whose gradients come token by token, (B, H, N) as such an input of `tokens` has; added up over
    # what is here they are each rank's share.
    by_token: Mapping[str, str] = MappingProxyType({})
    # Those whose gradients need no state gradients: they are computed while those are still on their way.
    early: ClassVar[tuple[str, ...]] = ()
    # Whether results can be written into given places, which lanes (leetdist.engine.lanes) need.
    writes_into_places: bool = False
    # Whether sequences that begin and end here need no states, of however many tiles they are: outputs and gradients of
    # `tiles` are then asked for with one state of zeros for all (leetdist.kernels.common.memory, `zero_states`).
    walks_rows: bool = False
    # Whether `fold` takes a `hop` (leetdist.sequence.transport.Transport.hop) in place of states that neighbours send
    # and get.
    folds_between: bool = False
    # Whether a pass is nothing but launches that leetdist.kernels.runtime.recording sees.
    launches_alone: bool = False

    @abstractmethod
    def __init__(self, problem: Problem, tokens: int) -> None:
        """tokens: of all ranks together."""

    @classmethod
    def chosen(cls, problem: Problem, tokens: int) -> Hashable:
        """What else decides on how it computes, such as kernels that settings choose: plans are remembered by it."""
        return None

    @classmethod
    def check_gate(cls, name: str, x: Tensor, problem: Problem) -> None:
        """ValueError where one of the inputs beside q, k and v does not fit them."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x)}")
        if x.device != problem.device:
            raise ValueError(f"{name} must be on q's device, {problem.device}, got {x.device}")
        if name in cls.heads:
            fits, wanted = x.shape[:1] == (problem.heads,), f"(H, ...) = ({problem.heads}, ...)"
        else:
            batch, tokens = problem.batch, problem.tokens
            fits = (
                x.ndim >= 3 and (x.shape[0], x.shape[2]) == (batch, tokens) and not problem.heads % max(1, x.shape[1])
            )
            wanted = f"(B, heads, N, ...) = ({batch}, a divisor of {problem.heads}, {tokens}, ...)"
        if not fits:
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")

    def part_of_tile(self, tile: int) -> int:
        """The tile length to compute with: the call's, or a part of it, so that all grids still fit."""
        return tile

    def prepared(self, x: Inputs, *, backward: bool) -> Inputs:
        """The inputs of a lane as the functions below take them, once a pass."""
        return x

    @abstractmethod
    def transitions(self, x: Inputs, tiles: Tiles) -> Tensor:
        """What `fold` needs to know of how each tile takes over the state before it."""

    @abstractmethod
    def summaries(self, x: Inputs, tiles: Tiles, *, to_end: bool, out: Tensor | None) -> Tensor:
        """What each tile adds to the state, from zero: (B, H, tiles, Dk, Dv) in the state's dtype, in `out` if given.
        to_end: False leaves out the tile that the walk ends with, which nobody reads."""

    @abstractmethod
    def fold(
        self, keep: Tensor, states: Tensor, initial: Tensor | None, tiles: Tiles, *, reverse: bool, to_end: bool
    ) -> Tensor | None:
        """Turn what each tile adds into the state at each tile's start, in place, left to right (with the transposed
        transitions right to left if `reverse`), and return the states at the end, (B * segments, H, Dk, Dv)."""

    @abstractmethod
    def outputs(self, x: Inputs, states: Tensor, tiles: Tiles, *, out: Tensor | None) -> Tensor:
        """o (B, H, N, Dv) in q's dtype, from the state at each tile's start; in `out` if given."""

    def finished(self, o: Tensor, x: Inputs) -> Tensor:
        """The outputs of all lanes as the call returns them; x: the inputs of all."""
        return o

    @abstractmethod
    def state_gradients(
        self, x: Inputs, states: Tensor, do: Tensor, tiles: Tiles, *, to_end: bool, out: Tensor | None
    ) -> Tensor:
        """What each tile's own outputs add to the gradient of the state at its start; as `summaries`."""

    @abstractmethod
    def early_gradients(
        self, x: Inputs, states: Tensor, do: Tensor, tiles: Tiles, places: Places, dtypes: Dtypes
    ) -> dict[str, Tensor]:
        """Gradients of the inputs named by `early`, for all H heads (one that is shared by several gets one of each),
        in these dtypes (of all that are wanted, the late ones too) and, where there are some, places. What comes under
        other names is kept for `late_gradients`."""

    @abstractmethod
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
        """Those of the other `tokens` that `places` names; ends: the gradient of the state at each tile's end; kept:
        what `early_gradients` has left. What comes under other names is kept for `head_gradients`."""

    @abstractmethod
    def head_gradients(
        self, x: Inputs, states: Tensor, ends: Tensor, do: Tensor, tiles: Tiles, *, kept: Inputs
    ) -> dict[str, Tensor]:
        """What each tile adds to the gradients of `heads`: (B, H, tiles, ...) each; kept: what `late_gradients` has
        left."""


class Transition(Protocol):
    """How a tile takes over the state before it; `keep` holds one a tile."""

    def apply(self, keep: Tensor, state: Tensor) -> Tensor: ...

    def transposed(self, keep: Tensor, gradient: Tensor) -> Tensor: ...


class Scalar:
    """keep (...): a number a head, as a decay."""

    def apply(self, keep: Tensor, state: Tensor) -> Tensor:
        return keep[..., None, None] * state

    transposed = apply


class Channel:
    """keep (..., Dk): a number a row of the state."""

    def apply(self, keep: Tensor, state: Tensor) -> Tensor:
        return keep[..., None] * state

    transposed = apply


class Matrix:
    """keep (..., Dk, Dk), as in delta rules."""

    def apply(self, keep: Tensor, state: Tensor) -> Tensor:
        return keep @ state

    def transposed(self, keep: Tensor, gradient: Tensor) -> Tensor:
        return keep.mT @ gradient


class TileOperator(Operator):
    """An operator from functions of one tile, in PyTorch: any device, as exact as any, and slow.

    Their tensors are those of one batch entry and one tile of n tokens, as if of a batch of one, all with H heads:
    tokens (1, H, n, ...), heads (H, ...), states (1, H, Dk, Dv), in the state's dtype. Each tile is computed by itself,
    from a copy of its tokens, so its bits depend on nothing but its own numbers.
    """

    transition: ClassVar[Transition] = Scalar()

    def __init__(self, problem: Problem, tokens: int) -> None:
        self.problem = problem
        self.dtype = state_dtype(problem.dtype)
        self._state = problem.dk, problem.dv

    @abstractmethod
    def summary(self, **x: Tensor) -> tuple[Tensor, Tensor]:
        """keep, as the transition takes it, and what the tile adds to a state of zero, (1, H, Dk, Dv)."""

    @abstractmethod
    def tile_outputs(self, state: Tensor, **x: Tensor) -> Tensor:
        """o (1, H, n, Dv), unscaled, from the state at the tile's start."""

    def transitions(self, x: Inputs, tiles: Tiles) -> Tensor:
        return self._stack([self.summary(**tile)[0] for _, _, tile in self._tiles(x, tiles)], x, tiles, ())

    def summaries(self, x: Inputs, tiles: Tiles, *, to_end: bool, out: Tensor | None) -> Tensor:
        return self._stack([self.summary(**tile)[1] for _, _, tile in self._tiles(x, tiles)], x, tiles, self._state)

    def fold(
        self, keep: Tensor, states: Tensor, initial: Tensor | None, tiles: Tiles, *, reverse: bool, to_end: bool
    ) -> Tensor | None:
        batch, heads, _, dk, dv = states.shape
        over = self.transition.transposed if reverse else self.transition.apply
        final = states.new_zeros(batch, tiles.num_segments, heads, dk, dv)
        if initial is not None:
            final.copy_(initial.view_as(final))
        for segment, (first, end) in enumerate(zip(tiles.first_tile, tiles.first_tile[1:], strict=False)):
            carry = final[:, segment].clone()
            for tile in reversed(range(first, end)) if reverse else range(first, end):
                added = states[:, :, tile].clone()
                states[:, :, tile] = carry
                for row in range(batch):  # by itself, as ever: a product's bits may depend on what it is batched with
                    carry[row] = over(keep[row, :, tile], carry[row].clone()) + added[row]
            final[:, segment] = carry
        return final.flatten(0, 1) if to_end else None

    def outputs(self, x: Inputs, states: Tensor, tiles: Tiles, *, out: Tensor | None) -> Tensor:
        q, v = x["q"], x["v"]
        whole = q.new_empty(q.shape[0], self.problem.heads, q.shape[2], v.shape[3])
        for row, number, tile in self._tiles(x, tiles):
            o = self.tile_outputs(states[row, None, :, number].contiguous(), **tile) * self.problem.scale
            whole[row, :, _span(tiles, number)] = o[0].to(q.dtype)
        return whole

    def state_gradients(
        self, x: Inputs, states: Tensor, do: Tensor, tiles: Tiles, *, to_end: bool, out: Tensor | None
    ) -> Tensor:
        added = []
        for row, number, tile in self._tiles(x, tiles):
            with torch.enable_grad():
                state = states[row, None, :, number].contiguous().requires_grad_()
                o = self.tile_outputs(state, **tile) * self.problem.scale
            added.append(torch.autograd.grad(o, state, self._do(do, row, tiles, number))[0])
        return self._stack(added, x, tiles, self._state)

    def early_gradients(
        self, x: Inputs, states: Tensor, do: Tensor, tiles: Tiles, places: Places, dtypes: Dtypes
    ) -> dict[str, Tensor]:
        return {}

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
        whole = {
            name: x[name].new_empty(x[name].shape[0], self.problem.heads, *x[name].shape[2:], dtype=dtypes[name])
            for name in places
        }
        for row, number, grads in self._gradients(tuple(places), x, states, ends, do, tiles):
            for name, grad in grads.items():
                whole[name][row, :, _span(tiles, number)] = grad[0].to(whole[name].dtype)
        return whole

    def head_gradients(
        self, x: Inputs, states: Tensor, ends: Tensor, do: Tensor, tiles: Tiles, *, kept: Inputs
    ) -> dict[str, Tensor]:
        shares = [grads for _, _, grads in self._gradients(self.heads, x, states, ends, do, tiles)]
        return {
            name: self._stack([grads[name][None] for grads in shares], x, tiles, x[name].shape[1:])
            for name in self.heads
        }

    def _gradients(
        self, names: tuple[str, ...], x: Inputs, states: Tensor, ends: Tensor, do: Tensor, tiles: Tiles
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Of each tile, from what its outputs and the state at its end receive; by autograd."""
        for row, number, tile in self._tiles(x, tiles):
            state = states[row, None, :, number].contiguous()
            with torch.enable_grad():
                wanted = {name: tile[name].requires_grad_() for name in names}
                keep, added = self.summary(**tile)
                end = self.transition.apply(keep, state) + added
                o = self.tile_outputs(state, **tile) * self.problem.scale
            flow = [self._do(do, row, tiles, number), ends[row, None, :, number].contiguous()]
            grads = torch.autograd.grad(
                [o, end], list(wanted.values()), flow, allow_unused=True, materialize_grads=True
            )
            yield row, number, dict(zip(wanted, grads, strict=True))

    def _tiles(self, x: Inputs, tiles: Tiles) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """(batch entry, number of the tile, its inputs): tile after tile, and its batch entries one by one."""
        heads = {name: x[name].detach().to(self.dtype) for name in self.heads}
        for number in range(tiles.count):
            for row in range(x["q"].shape[0]):
                tokens = {}
                for name in self.tokens:
                    own = x[name].detach()[row, None, :, _span(tiles, number)].to(self.dtype)
                    share = self.problem.heads // own.shape[1]
                    tokens[name] = own.repeat_interleave(share, 1)  # a copy, also of one head each
                yield row, number, tokens | heads

    def _do(self, do: Tensor, row: int, tiles: Tiles, number: int) -> Tensor:
        return do[row, None, :, _span(tiles, number)].to(self.dtype).contiguous()

    def _stack(self, parts: list[Tensor], x: Inputs, tiles: Tiles, rest: tuple[int, ...]) -> Tensor:
        """Of all batch entries and tiles: (1, H, *rest) each, to (B, H, tiles, *rest)."""
        batch = x["q"].shape[0]
        if not parts:
            return x["q"].new_empty(batch, self.problem.heads, 0, *rest, dtype=self.dtype)
        return torch.cat(parts).unflatten(0, (tiles.count, batch)).movedim(0, 2).contiguous()


def _span(tiles: Tiles, number: int) -> slice:
    begin, count = tiles.spans[number]
    return slice(begin, begin + count)
