"""Zamba2's Mamba-2 layers."""

from __future__ import annotations

from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from leetdist.integrations.ssd import Mixer, serves


@serves(Zamba2MambaMixer)
class Zamba2Layer(Mixer, Zamba2MambaMixer):
    """Zamba2's mixer through leetdist's operators."""


__all__ = ["Zamba2Layer"]
