"""Modules of our own, and the decay ladders of the published models."""

from leetdist.nn.attention import LightningAttention, Retention
from leetdist.nn.conv import causal_conv1d
from leetdist.nn.decay import LADDERS, check_decays, decays_of, ladder, log_decay
from leetdist.nn.gated import SimpleGLA
from leetdist.nn.mamba2 import GatedRMSNorm, Mamba2, Mamba2State

__all__ = [
    "LADDERS",
    "GatedRMSNorm",
    "LightningAttention",
    "Mamba2",
    "Mamba2State",
    "Retention",
    "SimpleGLA",
    "causal_conv1d",
    "check_decays",
    "decays_of",
    "ladder",
    "log_decay",
]
