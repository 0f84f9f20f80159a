"""The recurrence, token by token, with a decay a token; see the constant decay's."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from leetdist.kernels.constant_decay.pytorch import causal_dot_product
from leetdist.kernels.constant_decay.pytorch.token_walk import TokenWalk
from leetdist.kernels.token_decay.pytorch.walk import in_walk


class Decay(causal_dot_product.Decay):
    def steps(self, log_decay: Tensor, walk: TokenWalk) -> Tensor:
        return in_walk(log_decay, walk)


tile_outputs = partial(causal_dot_product.tile_outputs, decay_of=Decay)
