"""Modules of our own, and the decay ladders of the published models."""

from leetdist.nn.attention import LightningAttention, Retention
from leetdist.nn.conv import causal_conv1d
from leetdist.nn.decay import LADDERS, ladder, log_decay

__all__ = ["LADDERS", "LightningAttention", "Retention", "causal_conv1d", "ladder", "log_decay"]
