"""leetdist: exponentially decaying causal linear attention over sequences sharded across GPUs, bit for bit exact."""

import importlib
from typing import TYPE_CHECKING, Any

from leetdist.api import linear_attention, linear_attention_step
from leetdist.decoder import causal_linear_decoder
from leetdist.explain import explain
from leetdist.inference.files import load_states, save_states
from leetdist.inference.pool import StatePool
from leetdist.inference.session import Session
from leetdist.inference.state import State
from leetdist.inference.steps import linear_attention_steps
from leetdist.inference.stream import Stream, stream
from leetdist.mamba import mamba_chunk_scan_combined
from leetdist.sequence.group import sequence_parallel
from leetdist.sequence.halo import halo
from leetdist.sequence.shard import gather_sequence, shard_sequence
from leetdist.sequence.virtual import virtual_ranks

if TYPE_CHECKING:
    from leetdist import nn
    from leetdist.integrations.batches import shard_batch
    from leetdist.integrations.loader import ShardedLoader
    from leetdist.integrations.loss import reduce_loss
    from leetdist.integrations.parallelize import parallelize, unparallelize
    from leetdist.integrations.trainer import Trainer as Trainer
    from leetdist.mesh import device_mesh

__version__ = "0.1.0"

# Imported at first use: who only wants the operator need not wait for the rest. Name -> module (None: the name is one).
# Trainer is not in __all__: a star import has no need of transformers.
_LAZY: dict[str, str | None] = {
    "ShardedLoader": "leetdist.integrations.loader",
    "Trainer": "leetdist.integrations.trainer",
    "device_mesh": "leetdist.mesh",
    "nn": None,
    "parallelize": "leetdist.integrations.parallelize",
    "reduce_loss": "leetdist.integrations.loss",
    "shard_batch": "leetdist.integrations.batches",
    "unparallelize": "leetdist.integrations.parallelize",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'leetdist' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"leetdist.{name}")
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "causal_linear_decoder",
    "explain",
    "ShardedLoader",
    "device_mesh",
    "gather_sequence",
    "halo",
    "mamba_chunk_scan_combined",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_steps",
    "stream",
    "Stream",
    "Session",
    "State",
    "StatePool",
    "save_states",
    "load_states",
    "nn",
    "parallelize",
    "reduce_loss",
    "sequence_parallel",
    "shard_batch",
    "shard_sequence",
    "unparallelize",
    "virtual_ranks",
]
