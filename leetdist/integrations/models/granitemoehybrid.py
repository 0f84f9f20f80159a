"""GraniteMoeHybrid's Mamba-2 layers."""

from __future__ import annotations

from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from leetdist.integrations.ssd import Mixer, serves


@serves(GraniteMoeHybridMambaLayer)
class GraniteMoeHybridLayer(Mixer, GraniteMoeHybridMambaLayer):  # type: ignore[misc]
    """GraniteMoeHybrid's mixer through leetdist's operators."""


__all__ = ["GraniteMoeHybridLayer"]
