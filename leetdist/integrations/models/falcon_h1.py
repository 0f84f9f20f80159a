"""FalconH1's Mamba-2 layers: with multipliers around the projection, and gated by the scan where they have no norm."""

from __future__ import annotations

from torch import Tensor
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

from leetdist.integrations.ssd import Mixer, serves


@serves(FalconH1Mixer)
class FalconH1Layer(Mixer, FalconH1Mixer):
    """FalconH1's mixer through leetdist's operators."""

    ssm_in_multiplier: float
    mup_vector: Tensor

    def project(self, hidden_states: Tensor) -> Tensor:
        return super().project(hidden_states * self.ssm_in_multiplier) * self.mup_vector


__all__ = ["FalconH1Layer"]
