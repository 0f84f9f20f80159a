"""A tile that is open: decoding and prefill that stop inside it, and go on with the bits of one call.

`opened_by` finds the kernels that `linear_attention` computes with, and with them how much of a tile has to be kept
(leetdist.kernels.common.open_tiles): a chunk, where whoever computes outputs and tile states has a module that goes on
inside a tile (`Implementation.opened`), else the tile's tokens from its start. `open_steps` and `Opened.close` are
composed of those kernels; a module may have an `open_steps` of its own, that is faster, for what it `steps_serve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.kernels.common.blocks import OpenInBlocks
from leetdist.kernels.common.open_tiles import OpenTiles, rows_of_calls, writers, written
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.runtime.settings import raw_settings
from leetdist.operators.composition import Kernels
from leetdist.operators.methods import kernels_for

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem

MOST_TOKENS = 8  # of one decoding call, so that they reach into two chunks at most
OTHER_KERNELS = "the pool was made for other kernels than those that the environment asks for now"


@dataclass(frozen=True, eq=False)
class Opened:
    """The kernels of open tiles. module: what goes on inside a tile; None where a tile is taken as a whole."""

    kernels: Kernels
    module: Any
    tile: int
    chunk: int
    dtype: torch.dtype

    def keep(self, log_decay: Tensor) -> Tensor | None:
        """(H,): what the fold leaves of the state before a full tile; None for a decay a token."""
        if log_decay.ndim == 3:
            return None
        heads = log_decay.shape[0]
        nothing, one = (log_decay.new_full((1, heads, *size), x) for size, x in (((1, 1, 1), 0.0), ((1, 1), 1.0)))
        kept: Tensor | None = self.kernels.fold(nothing, one, log_decay, self._tiles(self.tile), reverse=False)
        assert kept is not None
        return kept.flatten()

    def fold(self, start: Tensor, own: Tensor, log_decay: Tensor, total: Tensor | None, tokens: int) -> Tensor:
        """The state after a tile of `tokens`, (B, H, Dk, Dv), from that at its start and its own sum."""
        gate = log_decay
        if total is not None:
            gate = self.module.keep_of(total, start.dtype)[..., None]
        after: Tensor | None = self.kernels.fold(
            own[:, :, None].clone(), start, gate, self._tiles(tokens), reverse=False
        )
        assert after is not None
        return after

    def fold_whole(self, start: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """The state after a tile, from all of its tokens."""
        tiles = self._tiles(k.shape[2])
        added = self.kernels.tile_states(k, v, log_decay, tiles, reverse=False)
        gate = self.kernels.transitions(log_decay, tiles)
        after: Tensor | None = self.kernels.fold(added, start, gate, tiles, reverse=False)
        assert after is not None
        return after

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, log_decay: Tensor, scale: float) -> Tensor:
        """o of tokens of one tile, from the state at the chunk's start that they begin with."""
        o: Tensor = self.kernels.tile_outputs(
            q, k, v, start[:, :, None], log_decay, self._tiles(k.shape[2]),
            reverse=False, scale=scale, state_scale=scale, out_dtype=self.dtype,
        )  # fmt: skip
        return o

    def whole_tiles(
        self,
        columns: Sequence[Sequence[Tensor]],
        lengths: Sequence[int],
        start: Tensor,
        log_decay: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor] | None:
        """o of whole tiles, of which q, k and v are in pieces of so many tokens, from the state before them, and the
        state after them; None where the module does not read them where they lie."""
        way = getattr(self.module, "whole_tiles", None)
        if way is None:
            return None
        found: tuple[Tensor, Tensor] | None = way(
            columns, lengths, start, log_decay, self._tiles(sum(lengths)), fold=self.kernels.fold, scale=scale
        )
        return found

    def advance(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        at: int | Tensor,
        walked: Tensor,
        own: Tensor,
        total: Tensor | None,
    ) -> None:
        """Some chunks further inside a tile, in place (pytorch/open_chunk.py)."""
        self.module.advance(k, v, log_decay, walked, own, total, tile=self.tile, at=at)

    def held(self, walked: Tensor) -> Tensor | None:
        """What the module's own `open_steps` reads of the walk's states, (B, H, any); None where it has none, or reads
        them as they are."""
        if not self.has_held(*walked.shape[2:]):
            return None
        found: Tensor = self.module.held(walked, self.dtype)
        return found

    def has_held(self, rows: int, columns: int) -> bool:
        return hasattr(self.module, "held") and self.module.steps_serve(rows, columns)

    def left_out(self, log_decay: Tensor) -> Tensor | None:
        """(H,): tokens at a full tile's start that its sum leaves out."""
        found: Tensor | None = self.module.left_out(log_decay, self.tile) if log_decay.ndim == 1 else None
        return found

    def _tiles(self, tokens: int) -> Tiles:
        return Tiles(self.tile, (0, tokens))


def opened_by(problem: Problem, tile: int) -> Opened:
    """Who computes open tiles of this length, for `method="block"`."""
    # What does not decide on kernels is left out, so that calls of all lengths share one answer.
    problem = replace(
        problem, batch=1, method="block", tile=tile, documents=None, tokens=tile, scale=1.0, needs_grad=False,
        needs_initial_grad=False, needs_decay_grad=False, grad_mode=False, has_initial=True, return_state=True,
    )  # fmt: skip
    return _opened_by(problem, tile, raw_settings())


@lru_cache(maxsize=512)
def _opened_by(problem: Problem, tile: int, _settings: object) -> Opened:
    kernels = kernels_for(problem, tile)
    walk, sums = (
        next(choice for choice in kernels.used if choice.use.step == step) for step in ("tile_outputs", "tile_states")
    )
    module = walk.implementation.loaded_opened() if walk.implementation is sums.implementation else None
    if module is not None and len(walk.blocks) > 1:
        begin, end = walk.blocks[-1]
        module = OpenInBlocks(module, end - begin)
    chunk = None if module is None else module.open_chunk(problem.dk, problem.dv, problem.dtype, tile)
    if chunk is None:
        module, chunk = None, tile
    return Opened(kernels, module, tile, chunk, problem.dtype)


def open_steps(
    opened: Opened,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    open_: OpenTiles,
    log_decay: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """T tokens of B sequences with the bits of one call: all T outputs, (B, H, T, Dv) in q's dtype.

    q, k, v: (B, H or fewer, T, Dk or Dv), T up to MOST_TOKENS; log_decay: (B, H, T) of a decay a token, else None. Row
    b works on slot index[b] (b without an index), and moves it on by lengths[b] tokens (T without lengths). No value is
    read on the host of a GPU. A row whose slot or length does not exist changes nothing and gets NaN.
    """
    if open_.walked is not None and opened.has_held(q.shape[3], v.shape[3]) != (open_.held is not None):
        raise ValueError(OTHER_KERNELS)
    own = getattr(opened.module, "open_steps", None)
    if own is not None and open_.walked is not None and opened.module.steps_serve(q.shape[3], v.shape[3]):
        o: Tensor = own(q, k, v, open_, log_decay, scale=scale, index=index, lengths=lengths)
        return o
    slots, kept, good = rows_of_calls(open_.tokens.shape[0], q.shape[0], q.shape[2], q.device, index, lengths)
    call = _Call(opened, open_, slots, kept, q.shape[2])
    o = call.outputs(q, k, v, log_decay, scale)
    call.keep()
    return o.masked_fill(~good[:, None, None, None], torch.nan)


class _Call:
    """One decoding call: its rows' tokens behind those of their open chunks, in the places that they have there."""

    def __init__(self, opened: Opened, open_: OpenTiles, slots: Tensor, kept: Tensor, tokens: int) -> None:
        self.opened, self.open, self.slots, self.kept, self.tokens = opened, open_, slots, kept, tokens
        chunk = open_.chunk
        self.ages = open_.tokens.index_select(0, slots)
        self.begin = self.ages % chunk
        # Where values may be read, no more is computed than there is.
        self.on_host = on_host = slots.device.type == "cpu" and not torch.compiler.is_compiling()
        self.width = int(self.begin.max()) + tokens if on_host else chunk + tokens - 1
        self.crosses = self.width > chunk
        self.closes = bool((self.begin + kept >= chunk).any()) if on_host else True
        self.after: dict[str, Tensor] | None = None

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
        opened, open_ = self.opened, self.open
        self.k, self.v = self._behind(open_.k, k), self._behind(open_.v, v)
        self.steps = None
        gate = open_.log_decay
        if log_decay is not None:
            self.steps = self._behind(open_.log_decay[..., None], log_decay[..., None].to(open_.log_decay.dtype))
            gate = self.steps[..., 0]
        q = self._behind(None, q)
        self.gate = gate
        first = min(self.width, open_.chunk)
        start = (open_.start if open_.walked is None else open_.walked).index_select(0, self.slots)

        def outputs(begin: int, end: int, start: Tensor) -> Tensor:
            some = slice(begin, end)
            gate = self.gate if self.steps is None else self.gate[:, :, some].contiguous()
            return opened.outputs(q[:, :, some], self.k[:, :, some], self.v[:, :, some], start, gate, scale)

        o = outputs(0, first, start)
        if self.crosses or self.closes:
            self.after = self._closed(start)
        if self.crosses and self.after is not None:
            o = torch.cat((o, outputs(open_.chunk, self.width, self.after["walked"])), 2)
        return self._rows_of(o, self.begin, self.tokens)

    @torch.no_grad()
    def keep(self) -> None:
        """Move the slots on."""
        open_, rows = self.open, writers(self.slots, self.kept)
        end = self.begin + self.kept
        closes = end >= open_.chunk

        def put(to: Tensor, source: Tensor) -> None:
            written(to, source.index_select(0, rows).to(to.dtype), self.slots)

        first = torch.where(closes, open_.chunk, 0)
        for to, x in ((open_.k, self.k), (open_.v, self.v)):
            put(to, self._rows_of(x, first, open_.chunk))
        if self.steps is not None:
            put(open_.log_decay, self._rows_of(self.steps, first, open_.chunk)[..., 0])
        if self.after is not None and self.closes:
            for name, x in self.after.items():
                to = getattr(open_, name)
                if to is not None:
                    here = closes.view(-1, *[1] * (x.ndim - 1))
                    put(to, torch.where(here, x, to.index_select(0, self.slots)))
        put(open_.tokens, self.ages + self.kept)

    def _behind(self, before: Tensor | None, x: Tensor) -> Tensor:
        """(B, heads, width, D): the kept tokens of the open chunk, the call's behind them, and zeros."""
        row = torch.arange(self.width, device=x.device)
        number = row - self.begin[:, None]  # of the call's tokens
        new = x.gather(2, self._everywhere(number.clamp(0, self.tokens - 1), x))
        new = new.masked_fill(((number < 0) | (number >= self.tokens))[:, None, :, None], 0)
        if before is None:
            return new
        held = before.index_select(0, self.slots)[:, :, : self.width]
        inside = (number < 0)[:, None, : held.shape[2], None]
        new[:, :, : held.shape[2]] = torch.where(inside, held, new[:, :, : held.shape[2]])
        return new

    def _rows_of(self, x: Tensor, first: Tensor, count: int) -> Tensor:
        """(B, heads, count, D): x's rows from `first` (B,) on; the last one's where there are no more."""
        row = (first[:, None] + torch.arange(count, device=x.device)).clamp_max(x.shape[2] - 1)
        return x.gather(2, self._everywhere(row, x))

    @staticmethod
    def _everywhere(rows: Tensor, x: Tensor) -> Tensor:
        return rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])

    def _closed(self, walked: Tensor) -> dict[str, Tensor]:
        """The states behind the open chunk, were it full, by their names in `OpenTiles`."""
        opened, open_ = self.opened, self.open
        chunk, start = open_.chunk, open_.start.index_select(0, self.slots)
        k, v = (_filled(x[:, :, :chunk], chunk) for x in (self.k, self.v))
        gate = self.gate if self.steps is None else _filled(self.steps[:, :, :chunk], chunk)[..., 0].contiguous()
        if open_.own is None:
            after = opened.fold_whole(start, k, v, gate)
            return {"start": after, "walked": after}
        walked, own = walked.clone(), open_.own.index_select(0, self.slots)
        total = None if open_.total is None else open_.total.index_select(0, self.slots)
        at = self.ages % open_.tile // chunk * chunk
        opened.advance(k, v, gate, at, walked, own, total)
        ends = at + chunk == open_.tile
        here = ends[:, None, None, None]
        folded = start
        if not self.on_host or bool(ends.any()):
            folded = opened.fold(start, own, open_.log_decay, total, open_.tile)
        found = {
            "start": torch.where(here, folded, start),
            "walked": torch.where(here, folded, walked),
            "own": own.masked_fill(here, 0),
        }
        return found if total is None else {**found, "total": total.masked_fill(ends[:, None], 0)}


def _filled(x: Tensor, tokens: int) -> Tensor:
    """x (B, heads, N, D) with zeros up to so many tokens."""
    return x if x.shape[2] == tokens else torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[2]))
