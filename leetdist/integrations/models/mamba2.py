"""Mamba2's Mamba-2 layers."""

from __future__ import annotations

from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from leetdist.integrations.ssd import Mixer, serves


@serves(Mamba2Mixer)
class Mamba2Layer(Mixer, Mamba2Mixer):
    """Mamba2's mixer through leetdist's operators."""


__all__ = ["Mamba2Layer"]
