"""Checkpoints that are whole or not there: written beside, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_NAME = re.compile(r"step-(\d{8})")


def write_atomically(folder: Path | str, step: int, write: Callable[[Path], object], *, keep: int = 2) -> Path:
    """`folder/step-<step>` from what `write(path)` puts into an empty folder; all ranks call this together.

    A job that is killed at any moment leaves whole checkpoints only: the new one gets its name after every rank has
    written and the files are on disk. Only the newest `keep` stay. `folder` is one that all ranks see.
    """
    folder, first = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    done, beside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    if first:
        for left_over in folder.glob("step-*.part"):
            shutil.rmtree(left_over)
        beside.mkdir(parents=True)
    _barrier()
    write(beside)
    _barrier()
    if first:
        for path in [*beside.rglob("*"), beside]:
            _to_disk(path)
        if done.exists():
            shutil.rmtree(done)
        beside.rename(done)
        _to_disk(folder)
        for _, path in sorted(_checkpoints(folder))[:-keep]:
            shutil.rmtree(path)
    _barrier()
    return done


def latest(folder: Path | str) -> tuple[int, Path] | None:
    """The step and the path of the newest whole checkpoint."""
    return max(_checkpoints(Path(folder)), default=None)


def save(folder: Path | str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **extra: Any) -> Path:
    """A checkpoint of a model under DDP, FSDP2 or neither; any of them loads it, on any number of ranks.

    extra: plain values, such as `loader=loader.state_dict()`. (DeepSpeed's engines have a checkpoint of their own.)
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_state

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "extra": json.dumps({"step": step, **extra})}
    return write_atomically(folder, step, lambda path: save_state(state, checkpoint_id=path))


def load(path: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads in place what `save` wrote; returns its `extra`, with `step`."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_state

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "extra": ""}
    load_state(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    extra: dict[str, Any] = json.loads(state["extra"])
    return extra


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return [(int(match[1]), path) for match, path in found if match]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["latest", "load", "save", "write_atomically"]
