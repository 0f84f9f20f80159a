"""Bamba's Mamba-2 layers."""

from __future__ import annotations

from transformers.models.bamba.modeling_bamba import BambaMixer

from leetdist.integrations.ssd import Mixer, serves


@serves(BambaMixer)
class BambaLayer(Mixer, BambaMixer):
    """Bamba's mixer through leetdist's operators."""


__all__ = ["BambaLayer"]
