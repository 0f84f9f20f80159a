"""Decoding with a decay a token in Triton: the functions of a constant one take either."""

from __future__ import annotations

from leetdist.kernels.constant_decay.triton.step import step
from leetdist.kernels.constant_decay.triton.steps import steps

__all__ = ["step", "steps"]
