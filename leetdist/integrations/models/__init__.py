"""One file a family of transformers models, by the name of transformers' own folder for it."""

from __future__ import annotations

import importlib
import sys

from torch import nn

FAMILIES = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "minimax", "nemotron_h", "xlstm", "zamba2")


def load(model: nn.Module) -> None:
    """Makes the families known whose layers are in the model; others cost no import."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    folders = {kind.__module__.split(".")[2] for kind in kinds if kind.__module__.startswith("transformers.models.")}
    for family in sorted(folders & set(FAMILIES)):
        importlib.import_module(f"{__name__}.{family}")


def prepare(model: nn.Module) -> None:
    """What families do to a model once its layers are theirs, besides."""
    for family in FAMILIES:
        module = sys.modules.get(f"{__name__}.{family}")
        if module is not None and hasattr(module, "prepare"):
            module.prepare(model)


__all__ = ["load", "prepare"]
