"""GraniteMoeHybrid's Mamba-2 layers."""

from __future__ import annotations

from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from leetdist.integrations.ssd import Mixer, serves


@serves(GraniteMoeHybridMambaLayer)
class GraniteMoeHybridLayer(Mixer, GraniteMoeHybridMambaLayer):
    """GraniteMoeHybrid's mixer through leetdist's operators."""

    model_masks_without_positions = True
    """So that its own attention does not keep packed documents apart, unless the model is given the mask."""


__all__ = ["GraniteMoeHybridLayer"]
