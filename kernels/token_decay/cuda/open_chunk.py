"""Open tiles on Hopper with a decay a token: constant_decay/cuda/open_chunk.cu with the weights of open_weights.cuh."""

from __future__ import annotations

from leetdist.kernels.constant_decay.cuda.open_chunk import advance, open_chunk, open_steps
from leetdist.kernels.token_decay.pytorch.open_chunk import keep_of, left_out

__all__ = ["advance", "keep_of", "left_out", "open_chunk", "open_steps"]
