"""Is what is resumed the same training? The options that make it what it is are kept in each checkpoint."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

# Another value of these is another training, on other data or of another model; of the rest, one that goes on
# otherwise, which may well be meant.
IDENTITY = ("text", "tokenizer", "model", "tokens", "batch", "seed")
TOLD = (
    "steps", "lr", "warmup", "clip", "precision", "micro_batch", "sequence_parallel", "checkpointing", "fsdp",
    "deepspeed_config",
)  # fmt: skip


def described(options: argparse.Namespace, tokens: Tensor) -> dict[str, Any]:
    """The options, the text by its content, as plain values."""
    values = {name: getattr(options, name) for name in (*IDENTITY, *TOLD)}
    content = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    return {**values, "text": f"{len(tokens)} tokens, sha256 {content}"}


def differences(before: dict[str, Any], now: dict[str, Any], changed: Collection[str], path: Path) -> list[str]:
    """In words, what goes on otherwise than the checkpoint's run did.

    Raises ValueError where it would be another training, for options that are not among `changed`.
    """
    if not before:
        return [f"{path} does not say with which options it was made"]
    unknown = sorted(set(changed) - set(now))
    if unknown:
        raise ValueError(f"--changed takes {', '.join(now)}, got {', '.join(unknown)}")
    words = {
        name: f"--{name.replace('_', '-')}: {value}; in {path.name}: {before[name]}"
        for name, value in now.items()
        if name in before and before[name] != value
    }
    refused = [name for name in words if name in IDENTITY and name not in changed]
    if refused:
        raise ValueError(
            f"{path} is of another training. {'. '.join(words[name] for name in refused)}. To go on all the same: "
            f"--changed {' '.join(refused)}"
        )
    return list(words.values())


__all__ = ["described", "differences"]
