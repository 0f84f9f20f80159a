"""A walk over all tiles at once, a chunk of each after the other, and the weights between its tokens and the state.

The steps of both passes (leetdist.kernels.constant_decay.pytorch.block) are such walks. `Walk` and `Chunk` know where
tokens are; what stands between them is told by their kinds: here powers of one decay a head, and products of decays of
their own, a token each, in leetdist.kernels.token_decay.pytorch.walk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.pytorch.reused import reused

# Tokens a matrix product works on. 128 was the fastest of 32, 64, 128 and 256 for D = 64 and 128 on two CPU cores.
CHUNK = 128
# From here on gamma is 0 in fp64 too; but gamma^0 is 1, where that of a log-decay of -inf would be NaN.
LEAST = -1e4


ChunkT = TypeVar("ChunkT", bound="Chunk")


class Walk(ABC, Generic[ChunkT]):
    """Walks all tiles at once, chunk after chunk, in one direction of time."""

    def __init__(self, tiles: Tiles, log_decay: Tensor, dtype: torch.dtype, reverse: bool, unread: int = -1) -> None:
        self.tiles, self.reverse, self.unread = tiles, reverse, unread
        self.log_decay = log_decay
        self.heads = log_decay.shape[self.head_dim]
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.device = log_decay.device
        self.chunk = min(CHUNK, tiles.size)

    head_dim: ClassVar[int]  # of log_decay

    def zeros(self, batch: int, *shape: int) -> Tensor:
        return torch.zeros(batch, self.heads, *shape, dtype=self.dtype, device=self.device)

    @abstractmethod
    def chunk_at(self, place: Place) -> ChunkT: ...

    def __iter__(self) -> Iterator[ChunkT]:
        tiles = self.tiles
        for place in reused(places, tiles.num_tokens, self.device, tiles, self.chunk, self.reverse, self.unread):
            yield self.chunk_at(place)


WalkOf = Callable[..., Walk[Any]]


class ConstantWalk(Walk["ConstantChunk"]):
    """The weights are powers of one decay a head, log_decay (H,)."""

    head_dim = 0

    @cached_property
    def powers(self) -> Tensor:
        return decay_powers(self.log_decay, max(self.chunk, 1), self.dtype)

    @cached_property
    def mask(self) -> Tensor:
        """(H, 1, C, C): gamma^distance where the second token is not later in the direction of the walk, else 0."""
        distance, seen = reused(distances, self.chunk, self.device, self.chunk, self.reverse)
        return (self.powers[:, distance] * seen)[:, None]

    def chunk_at(self, place: Place) -> ConstantChunk:
        return ConstantChunk(self, place)


def _exponents(device: torch.device, count: int) -> Iterator[Tensor]:
    yield torch.arange(count, device=device, dtype=torch.float64)


def distances(device: torch.device, chunk: int, reverse: bool) -> Iterator[Tensor]:
    """(C, C) each: how far the second token is behind the first, at least 0; whether the first sees it."""
    position = torch.arange(chunk, device=device)
    distance = position[:, None] - position
    if reverse:
        distance = distance.T
    yield distance.clamp_min(0)
    yield distance >= 0


@dataclass(frozen=True, eq=False)
class Place:
    """Where the tokens are of one chunk of every tile that still has one. Of A tiles, with C tokens in a chunk:

    lengths: (A,), tokens of each; rows: (A * C,), each token's number in the row; outside: (A, C, 1), where there is
    no token; from_state, to_state: (A, C), the powers of gamma between a token and the state at the chunk's start, and
    at its end.
    """

    tiles: slice | Tensor
    lengths: Tensor
    rows: Tensor
    outside: Tensor
    full: bool
    from_state: Tensor
    to_state: Tensor


def places(device: torch.device, tiles: Tiles, chunk: int, reverse: bool, unread: int) -> Iterator[Place]:
    table = tiles.table(device)
    start, length = table[:, 0], table[:, 1]
    position = torch.arange(chunk, device=device)
    chunks = [ceil_div(tokens, chunk) for _, tokens in tiles.spans]
    if unread >= 0:
        chunks[unread] = 0
    for step in range(max(chunks, default=0)):
        active = [tile for tile, count in enumerate(chunks) if count > step]
        which = torch.tensor(active, device=device)
        number = [chunks[t] - 1 - step if reverse else step for t in active]
        offset = torch.tensor(number, dtype=torch.int64, device=device) * chunk
        lengths = (length[which] - offset).clamp_max(chunk)
        outside = position >= lengths[:, None]
        before, after = position.expand(outside.shape), (lengths[:, None] - 1 - position).clamp_min(0)
        yield Place(
            tiles=slice(active[0], active[-1] + 1) if len(active) == active[-1] + 1 - active[0] else which,
            lengths=lengths,
            rows=((start[which] + offset)[:, None] + torch.minimum(position, lengths[:, None] - 1)).flatten(),
            outside=outside[..., None],
            full=not outside.any(),
            from_state=after if reverse else before + 1,
            to_state=before + 1 if reverse else after,
        )


class Chunk(ABC):
    """One chunk of every tile that still has one: its tokens, and the weights between them and the state."""

    def __init__(self, walk: Walk[Any], place: Place) -> None:
        self.walk, self.place, self.tiles = walk, place, place.tiles

    @abstractmethod
    def pairs(self) -> Tensor:
        """The weight between two tokens, (B or 1, H, A or 1, C, C): 0 where the second is later in the walk."""

    @abstractmethod
    def from_state(self) -> Tensor:
        """Between the state that the walk comes with and each token, (B or 1, H, A, C, 1)."""

    @abstractmethod
    def to_state(self) -> Tensor:
        """Between each token and the state that the walk goes on with, (B or 1, H, A, C, 1)."""

    @abstractmethod
    def across(self) -> Tensor:
        """Between the two states, (B or 1, H, A, 1, 1)."""

    def take(self, x: Tensor) -> Tensor:
        """The chunk's rows of x (B, Hx, N, D), for every head: (B, H, A, C, padded D), zero where there is no token."""
        x = x.index_select(2, self.place.rows).to(self.walk.dtype)
        if missing(x.shape[3]):
            x = F.pad(x, (0, missing(x.shape[3])))
        x = x.unflatten(2, self.place.outside.shape[:2])
        if not self.place.full:
            x = x.masked_fill(self.place.outside, 0)
        return x if x.shape[1] == self.walk.heads else x.repeat_interleave(self.walk.heads // x.shape[1], 1)

    def put(self, out: Tensor, x: Tensor) -> None:
        x, rows = x.flatten(2, 3)[..., : out.shape[3]], self.place.rows
        if not self.place.full:
            inside = ~self.place.outside.flatten()
            x, rows = x[:, :, inside], rows[inside]
        out.index_copy_(2, rows, x.to(out.dtype))

    def of(self, state: Tensor) -> Tensor:
        return state[:, :, self.tiles]

    def advance(self, state: Tensor, update: Tensor, add: Tensor | None = None) -> None:
        """state = across (state + add) + update, on the tiles of this chunk."""
        old = self.of(state)  # a view if all tiles have this chunk, else a copy
        state[:, :, self.tiles] = (old if add is None else old.add_(add)).mul_(self.across()).add_(update)


class ConstantChunk(Chunk):
    walk: ConstantWalk

    def pairs(self) -> Tensor:
        return self.walk.mask

    def from_state(self) -> Tensor:
        return self.walk.powers[:, self.place.from_state, None]

    def to_state(self) -> Tensor:
        return self.walk.powers[:, self.place.to_state, None]

    def across(self) -> Tensor:
        return self.walk.powers[:, self.place.lengths, None, None]


def missing(dim: int) -> int:
    """Zeros that a head dimension is padded with, to a multiple of 64 bytes in fp32."""
    return -dim % 16


def padded(states: Tensor) -> Tensor:
    """A copy of states (..., Dk, Dv) with both dimensions padded."""
    rows, columns = missing(states.shape[-2]), missing(states.shape[-1])
    return F.pad(states, (0, columns, 0, rows)) if rows or columns else states.clone()


def decay_powers(log_decay: Tensor, highest: int, dtype: torch.dtype) -> Tensor:
    """`gamma^0 ... gamma^highest`: (H, highest + 1) in `dtype`, each rounded once from fp64."""
    (exponents,) = reused(_exponents, highest, log_decay.device, highest + 1)
    return torch.exp(log_decay.double().clamp_min(LEAST)[:, None] * exponents).to(dtype)
