"""leetdist: exponentially decaying causal linear attention over sequences sharded across GPUs, bit for bit exact."""

from leetdist.api import linear_attention, linear_attention_step
from leetdist.decoder import causal_linear_decoder
from leetdist.explain import explain
from leetdist.sequence.group import sequence_parallel
from leetdist.sequence.shard import gather_sequence, shard_sequence
from leetdist.sequence.virtual import virtual_ranks

__version__ = "0.1.0"

__all__ = [
    "causal_linear_decoder",
    "explain",
    "gather_sequence",
    "linear_attention",
    "linear_attention_step",
    "sequence_parallel",
    "shard_sequence",
    "virtual_ranks",
]
