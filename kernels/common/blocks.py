"""States with more rows than a kernel takes, block by block of rows.

The rows of the state are the columns of q and k. Linear attention has no softmax, so its outputs are a sum of what
each block of rows gives by itself, and so is the gradient of the decays. What a tile adds to the state needs no sum:
each row of it stands by itself. Blocks come in one order, and outputs are added up in fp32: each block's kernel adds
what the blocks before it have given (`onto`) to its own outputs before it rounds. Columns of the state, which are v's,
a kernel takes in any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial, update_wrapper
from math import lcm
from typing import Any, TypeVar

import torch
from torch import Tensor

from leetdist.kernels.common.memory import empty_outputs, empty_states, heads_of
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.runtime.recording import the_same

Span = tuple[int, int]

COLUMNS = 128  # of the state, that a program has, or two
# The least to be computed at a time: programs, one for each multiprocessor, which have room for no more of such states
# (256: as fast, and twice the memory), and bytes of outputs in fp32.
PROGRAMS, BYTES = 128, 2**26


BETWEEN = "_between"
Outputs = TypeVar("Outputs", bound=Callable[..., Tensor])


def taking(between: Callable[..., Tensor]) -> Callable[[Outputs], Outputs]:
    """For a function `tile_outputs` whose outputs that others are added to lie as it likes: takes memory for them."""

    def told(function: Outputs) -> Outputs:
        setattr(function, BETWEEN, between)
        return function

    return told


def blocks_of(rows: int, most: int) -> list[Span]:
    """Begin and end of each block of at most so many rows: all are full but the first, so that what adds to others is
    of one size."""
    first = rows % most or most
    return [(max(end - most, 0), end) for end in range(first, rows + 1, most)]


@lru_cache(maxsize=256)
def in_blocks(function: Callable[..., Any], step: str, most: int) -> Callable[..., Any]:
    """The function of a step for states of any number of rows, from one for at most so many."""
    whole = STEPS.get(step)
    return function if whole is None else update_wrapper(partial(whole, function, most), function)


def tile_states(
    function: Callable[..., Tensor],
    most: int,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    if out is None:
        out = empty_states(b, c, log_decay, tiles)
    for begin, end in blocks_of(b.shape[3], most):
        function(b[..., begin:end], c, log_decay, tiles, out=out[..., begin:end, :], **options)
    return out


def tile_outputs(
    function: Callable[..., Tensor],
    most: int,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    if out is None:
        out = empty_outputs(a, c, log_decay, out_dtype)
    for q, k, v, start, to, decay in some_at_a_time(a, b, c, states, out, log_decay, tiles):
        onto: Tensor | None = None
        for number, (begin, end) in enumerate(blocks_of(a.shape[3], most)):
            place = to if end == a.shape[3] else _between(function, q, v, decay, tiles, number % 2)  # one is read
            more = {} if onto is None else {"onto": onto}
            onto = function(
                q[..., begin:end], k[..., begin:end], v, start[..., begin:end, :], decay, tiles,
                out_dtype=place.dtype, out=place, **more, **options,
            )  # fmt: skip
    return out


def _between(
    function: Callable[..., Tensor], a: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles, number: int
) -> Tensor:
    """Memory for outputs in fp32 that others are added to: the same for all that come one after the other, and as the
    function wants it."""
    own = getattr(function, BETWEEN, None)
    name = number, own, a.shape[:3], c.shape[3], heads_of(log_decay), a.stride(1) < a.stride(2), tiles.count, c.device
    return the_same(
        name, lambda: empty_outputs(a, c, log_decay, torch.float32) if own is None else own(a, c, log_decay, tiles)
    )


def some_at_a_time(
    a: Tensor, b: Tensor, c: Tensor, states: Tensor, out: Tensor, log_decay: Tensor, tiles: Tiles
) -> Iterator[tuple[Tensor, ...]]:
    """The same of some sequences, or of some heads of a single one: so few that outputs in fp32, which others are added
    to, take little memory, and as many as a GPU has work with. No bit depends on it."""
    batch, heads = a.shape[0], heads_of(log_decay)
    together = lcm(*(heads // x.shape[1] for x in (a, b, c)))  # heads that share something
    dim, number = (0, batch) if batch > 1 else (1, heads // together)
    programs = batch * heads * tiles.count * ceil_div(c.shape[3], COLUMNS)
    size = 4 * batch * heads * a.shape[2] * c.shape[3]
    most = ceil_div(number, max(1, min(programs // PROGRAMS, size // BYTES)))

    for begin in range(0, number, most):
        count = min(most, number - begin)

        def own(x: Tensor, dim: int, begin: int = begin, count: int = count) -> Tensor:
            return x.narrow(dim, x.shape[dim] * begin // number, x.shape[dim] * count // number)

        of_all = log_decay.ndim == 1 and dim == 0
        decay = log_decay if of_all else own(log_decay, min(dim, log_decay.ndim - 1))
        yield *(own(x, dim) for x in (a, b, c, states, out)), decay


def decay_gradient(
    function: Callable[..., Tensor],
    most: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    state_grads: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    scale: float,
) -> Tensor:
    total: Tensor | None = None
    for begin, end in blocks_of(q.shape[3], most):
        at_tiles = (x[..., begin:end, :] for x in (states, state_grads))
        share = function(q[..., begin:end], k[..., begin:end], v, do, *at_tiles, log_decay, tiles, scale=scale)
        total = share if total is None else total + share
    assert total is not None
    return total


class OpenInBlocks:
    """A module that goes on inside a tile (leetdist.kernels.constant_decay.pytorch.open_chunk) with at most so many
    rows, for any number."""

    def __init__(self, module: Any, most: int) -> None:
        self._module, self._most = module, most

    def open_chunk(self, rows: int, columns: int, dtype: torch.dtype, tile: int) -> int | None:
        found: int | None = self._module.open_chunk(self._most, columns, dtype, tile)
        return found

    def left_out(self, log_decay: Tensor, tile: int) -> Tensor | None:
        found: Tensor | None = self._module.left_out(log_decay, tile)
        return found

    def keep_of(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        found: Tensor = self._module.keep_of(total, dtype)
        return found

    def advance(
        self, k: Tensor, v: Tensor, log_decay: Tensor, walked: Tensor, own: Tensor, total: Tensor | None, **where: Any
    ) -> None:
        rows = k.shape[3]
        for begin, end in blocks_of(rows, self._most):
            some = [x[:, :, begin:end].contiguous() for x in (walked, own)]
            moved = total if total is None or end == rows else total.clone()  # once, behind all that read it
            self._module.advance(k[..., begin:end], v, log_decay, *some, moved, **where)
            for to, x in zip((walked, own), some, strict=True):
                to[:, :, begin:end] = x


STEPS: dict[str, Callable[..., Tensor]] = {
    "tile_states": tile_states, "tile_outputs": tile_outputs, "decay_gradient": decay_gradient
}  # fmt: skip
