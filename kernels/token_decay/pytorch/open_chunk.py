"""How a tile with a decay a token goes on: that of a constant decay, with other weights."""

from __future__ import annotations

from functools import partial

from leetdist.kernels.constant_decay.pytorch import open_chunk as constant
from leetdist.kernels.token_decay.pytorch.walk import TokenDecayWalk

open_chunk = constant.open_chunk
left_out = constant.left_out
keep_of = constant.keep_of
advance = partial(constant.advance, walk_of=TokenDecayWalk)
