"""FleetAttention's outputs with a decay a token; see the constant decay's."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor

from leetdist.kernels.constant_decay.pytorch import fleet
from leetdist.kernels.constant_decay.pytorch.token_walk import TokenWalk
from leetdist.kernels.token_decay.pytorch.walk import in_walk


class Powers:
    """Exponentials of sums of log-decays over 1, 2, 4, ... tokens, each sum twice one of half as many."""

    def __init__(self, log_decay: Tensor, walk: TokenWalk, dtype: torch.dtype) -> None:
        steps = in_walk(log_decay, walk)
        if walk.reverse:  # the decay between two tokens is that of the later one, which the walk comes to first
            steps = torch.cat((torch.zeros_like(steps[..., :1]), steps[..., :-1]), -1)
        self.steps, self.dtype = steps, dtype

    def first(self) -> Tensor:
        step = self.steps[..., :1].sum(-1, keepdim=True)  # itself, or 0 where no tile has a token
        return torch.exp(step)[..., None].to(self.dtype)

    def over(self, distance: int) -> Tensor:
        return self.doubled[distance]

    @cached_property
    def doubled(self) -> dict[int, Tensor]:
        found, sums, distance = {}, self.steps, 1
        while distance < sums.shape[-1]:
            found[distance] = torch.exp(sums[..., distance:, None]).to(self.dtype)
            later = sums[..., distance:] + sums[..., :-distance]
            sums = torch.cat((sums[..., :distance], later), -1)
            distance *= 2
        return found


tile_outputs = partial(fleet.tile_outputs, powers_of=Powers)
