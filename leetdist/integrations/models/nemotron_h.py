"""NemotronH's Mamba-2 layers."""

from __future__ import annotations

from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from leetdist.integrations.ssd import Mixer, serves


@serves(NemotronHMamba2Mixer)
class NemotronHLayer(Mixer, NemotronHMamba2Mixer):
    """NemotronH's mixer through leetdist's operators."""


__all__ = ["NemotronHLayer"]
