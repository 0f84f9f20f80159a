"""Decoding with a decay a token: the functions of a constant one take either."""

from __future__ import annotations

from leetdist.kernels.constant_decay.pytorch.decode import step, steps

__all__ = ["step", "steps"]
