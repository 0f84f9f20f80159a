"""The weights of a decay a token: exponentials of sums of log-decays, taken within a chunk.

With G_i the sum of log_decay from the chunk's first token to token i, inclusive, token j weighs exp(G_i - G_j) in token
i, the state at the chunk's start exp(G_i), and token j in the state at its end exp(G_n - G_j). A difference of two sums
loses what the larger has no digits for: after steps of -50, fp64 would leave 1e-13 of steps of -1e-3, fp32 nothing. So
a sum is two fp64 numbers, high and low, whose own order is the same for every chunk: that of doubling.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from leetdist.kernels.constant_decay.pytorch.reused import reused
from leetdist.kernels.constant_decay.pytorch.token_walk import TokenWalk
from leetdist.kernels.constant_decay.pytorch.walk import LEAST, Chunk, Place, Walk, distances


class TokenDecayWalk(Walk["TokenDecayChunk"]):
    """log_decay: (B, H, N). A step that is positive or NaN makes NaN of all weights across it."""

    head_dim = 1

    def chunk_at(self, place: Place) -> TokenDecayChunk:
        return TokenDecayChunk(self, place)


class TokenDecayChunk(Chunk):
    """Weights in the walk's dtype, each rounded once from fp64."""

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """G, high and low, (B, H, A, C) in fp64; behind the last token it stays what it is there."""
        place = self.place
        steps = checked(self.walk.log_decay.index_select(2, place.rows)).unflatten(2, place.outside.shape[:2])
        if not place.full:
            steps = steps.masked_fill(place.outside[..., 0], 0)
        return exact_sums(steps)

    def _between(self, later: slice, earlier: slice) -> Tensor:
        """exp(G_later - G_earlier) of slices of C."""
        high, low = self.sums
        return self._weight((high[..., later] - high[..., earlier]) + (low[..., later] - low[..., earlier]))

    def _weight(self, exponent: Tensor) -> Tensor:
        return exponent.exp_().to(self.walk.dtype)

    def _from_start(self) -> Tensor:
        high, low = self.sums
        return self._weight(high + low)[..., None]

    def _to_end(self) -> Tensor:
        return self._between(slice(-1, None), slice(None))[..., None]

    def pairs(self) -> Tensor:
        _, seen = reused(distances, self.walk.chunk, self.walk.device, self.walk.chunk, self.walk.reverse)
        high, low = self.sums
        later, earlier = (-2, -1) if self.walk.reverse else (-1, -2)  # where a dimension of one is put in
        exponent = high.unsqueeze(later) - high.unsqueeze(earlier)
        if self.walk.dtype == torch.float64:  # else the digits of high are more than enough
            exponent += low.unsqueeze(later) - low.unsqueeze(earlier)
        return self._weight(exponent.masked_fill_(~seen, -math.inf))

    def from_state(self) -> Tensor:
        return self._to_end() if self.walk.reverse else self._from_start()

    def to_state(self) -> Tensor:
        return self._from_start() if self.walk.reverse else self._to_end()

    def across(self) -> Tensor:
        return self._weight(self.total())[..., None, None]

    def total(self) -> Tensor:
        """G_n, (B, H, A) in fp64."""
        high, low = self.sums
        return high[..., -1] + low[..., -1]


def checked(log_decay: Tensor) -> Tensor:
    """In fp64 and finite; NaN where it is no log-decay: positive, or NaN."""
    log_decay = log_decay.double()
    return torch.where(log_decay <= 0, log_decay.clamp_min(LEAST), math.nan)


def in_walk(log_decay: Tensor, walk: TokenWalk) -> Tensor:
    """(B, H, N) as (B, H, tiles, steps) in the order of a walk token by token, `checked`; 0 where a tile has no more
    tokens."""
    return walk.take(checked(log_decay)[..., None], log_decay.shape[1], torch.float64)[..., 0]


def exact_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of x (..., C), as the sum of two numbers of its dtype with the digits of both."""
    high, low = x, torch.zeros_like(x)
    distance = 1
    while distance < x.shape[-1]:
        a, b = high[..., distance:], high[..., :-distance]
        total = a + b
        part = total - a
        lost = (a - (total - part)) + (b - part)  # what the sum has rounded away, exactly
        low = torch.cat((low[..., :distance], low[..., distance:] + low[..., :-distance] + lost), -1)
        high = torch.cat((high[..., :distance], total), -1)
        distance *= 2
    return high, low


def running_sums(x: Tensor, dim: int) -> Tensor:
    """Sums along `dim` up to each place, by doubling: in the same order on every device, as cumsum is not."""
    distance = 1
    while distance < x.shape[dim]:
        rest = x.shape[dim] - distance
        later = x.narrow(dim, distance, rest) + x.narrow(dim, 0, rest)
        x = torch.cat((x.narrow(dim, 0, distance), later), dim)
        distance *= 2
    return x
