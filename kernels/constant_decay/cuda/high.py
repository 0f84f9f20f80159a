"""The kernels for Hopper of hopper.py for `precision="high"`: states and scores as two 16-bit numbers each."""

from __future__ import annotations

from functools import partial

from leetdist.kernels.constant_decay.cuda import hopper
from leetdist.kernels.constant_decay.cuda.hopper import configuration, tile_states

__all__ = ["compile_for", "configuration", "tile_outputs", "tile_states"]

tile_outputs = partial(hopper.tile_outputs, high=True)
compile_for = partial(hopper.compile_for, high=True)
