"""What a transformers model hands to all of its layers, and a layer that mixes tokens may pass over."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

# Positions, which are in q and k by now or mean nothing; what the caches have said already; and what the model does
# with its outputs.
HANDED_TO_ALL = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "return_dict",
        "logits_to_keep", "num_items_in_batch", "shift_labels", "max_length_q", "max_length_k",
    }
)  # fmt: skip


def check_known(options: Mapping[str, Any], layer: str, *, besides: Set[str]) -> None:
    """ValueError that names those with a value that are neither handed to all nor known to this layer `besides`."""
    known = HANDED_TO_ALL | besides
    unknown = sorted(name for name, value in options.items() if value is not None and name not in known)
    if unknown:
        raise ValueError(f"{layer} knows no {', '.join(unknown)} under leetdist")


__all__ = ["HANDED_TO_ALL", "check_known"]
