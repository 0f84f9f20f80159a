"""leetdist: exponentially decaying causal linear attention over sequences sharded across GPUs, bit for bit exact."""

from leetdist.api import linear_attention, linear_attention_step
from leetdist.inference.files import load_states, save_states
from leetdist.inference.pool import StatePool
from leetdist.inference.state import State
from leetdist.inference.steps import linear_attention_steps
from leetdist.inference.stream import stream
from leetdist.sequence.group import sequence_parallel
from leetdist.sequence.shard import gather_sequence, shard_sequence
from leetdist.sequence.virtual import virtual_ranks

__version__ = "0.1.0"

__all__ = [
    "gather_sequence",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_steps",
    "stream",
    "State",
    "StatePool",
    "save_states",
    "load_states",
    "sequence_parallel",
    "shard_sequence",
    "virtual_ranks",
]
