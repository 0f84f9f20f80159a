"""The kernels for Hopper of kernels/constant_decay/cuda, with the weights of a decay a token (hopper_weights.cuh)."""

from __future__ import annotations

from functools import partial

from leetdist.kernels.constant_decay.cuda import hopper
from leetdist.kernels.constant_decay.cuda.hopper import configuration, tile_outputs, tile_states

__all__ = ["compile_for", "configuration", "tile_outputs", "tile_states"]

compile_for = partial(hopper.compile_for, token=True)
