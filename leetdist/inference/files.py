"""States in files: safetensors, with the identity of what made them, checked before anything is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leetdist.inference.problem import check_like
from leetdist.inference.state import State

FORMAT = "leetdist.states/1"
TENSORS = ("boundary", "k", "v", "log_decay")
FIELDS = ("tokens", "tile", "scale", "method")


def save_states(path: str | Path, states: Mapping[str, State], *, model: str = "") -> None:
    """Write states, say one for each layer of a model, to one safetensors file; atomically.

    Args:
        path: the file, replaced as a whole where it exists.
        states: by name; their tensors keep shape, dtype and bits.
        model: any text that says which model they belong to (a name and a hash of its weights, say).

    Raises:
        ValueError: `states` is empty.
        ModuleNotFoundError: safetensors is not installed.

    Source: the safetensors format, version 0.5 and later; shapes and dtypes as in `State`.

    >>> import torch, leetdist, tempfile, os
    >>> prompt = leetdist.stream(torch.tensor([-0.1, -1.0]), tile=16)
    >>> o = prompt.push(*(torch.randn(1, 2, 50, 16) for _ in range(3)))
    >>> file = os.path.join(tempfile.mkdtemp(), "prompt.safetensors")
    >>> leetdist.save_states(file, {"layer": prompt.state}, model="tiny")
    >>> again = leetdist.stream(state=leetdist.load_states(file, model="tiny")["layer"])
    >>> again.tokens, torch.equal(again.state.now, prompt.state.now)
    (50, True)
    """
    from safetensors.torch import save_file

    if not states:
        raise ValueError("states is empty: there is nothing to save")
    tensors = {
        f"{name}.{part}": getattr(state, part).detach().cpu().contiguous().clone()
        for name, state in states.items()
        for part in TENSORS
    }
    fields = {name: {field: getattr(state, field) for field in FIELDS} for name, state in states.items()}
    told = {"format": FORMAT, "model": model, "states": json.dumps(fields, sort_keys=True)}
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, {**told, "sha256": _digest(tensors, told)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_states(
    path: str | Path,
    *,
    model: str | None = None,
    like: Mapping[str, State] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, State]:
    """Read what `save_states` wrote; a damaged, truncated or foreign file is refused.

    Args:
        path: the file.
        model: the text given to `save_states`; None takes any.
        like: states of the model at hand, by the same names (of any batch and age): head counts and sizes, dtypes,
            decay (bit for bit), scale, tile and method must be theirs. None takes any.
        device: where the states go. They may have been made on another device, and on any number of ranks.

    Raises:
        ValueError: the file is no such file, is damaged or cut short, or holds states of another model; the message
            says what was found and what was wanted.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: safetensors is not installed.

    Source: the safetensors format; shapes and dtypes as in `State`.

    >>> import torch, leetdist, tempfile, os
    >>> prompt = leetdist.stream(torch.tensor([-0.1, -1.0]), tile=16)
    >>> o = prompt.push(*(torch.randn(1, 2, 50, 16) for _ in range(3)))
    >>> file = os.path.join(tempfile.mkdtemp(), "prompt.safetensors")
    >>> leetdist.save_states(file, {"layer": prompt.state}, model="tiny")
    >>> leetdist.load_states(file, model="large")
    Traceback (most recent call last):
    ...
    ValueError: ...prompt.safetensors holds states of the model 'tiny', wanted 'large'
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            told = dict(file.metadata() or {})
            if told.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no file of save_states: its format is {told.get('format')!r}, wanted {FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, cut short, or no safetensors file: {error}") from None
    if told.pop("sha256", None) != _digest(tensors, told):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    if model is not None and told["model"] != model:
        raise ValueError(f"{path} holds states of the model {told['model']!r}, wanted {model!r}")
    made: dict[str, dict[str, Any]] = json.loads(told["states"])
    states = {
        name: State(**{part: tensors[f"{name}.{part}"] for part in TENSORS}, **fields) for name, fields in made.items()
    }
    if like is not None and set(like) != set(states):
        raise ValueError(f"{path} holds the states {sorted(states)}, wanted {sorted(like)}")
    for name, expected in (like or {}).items():
        try:
            check_like(states[name], expected)
        except ValueError as error:
            raise ValueError(f"{path}, state {name!r}: {error}") from None
    return {name: state.to(device) for name, state in states.items()}


def _digest(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    """Over every bit that counts: what the states say of themselves, and their tensors."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: numpy has no bf16.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["load_states", "save_states"]
