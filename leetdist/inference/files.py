"""States in files: safetensors, with the identity of what made them, checked before anything is used."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leetdist.arguments import check_device
from leetdist.inference.checks import check_path
from leetdist.inference.state import TENSORS, State
from leetdist.inference.state_checks import check_like, check_states, check_whole

FORMAT = "leetdist.states/1"
FIELDS = ("tokens", "tile", "scale", "method")
ALWAYS = ("boundary", "k", "v", "log_decay")
CLOSED = "closed"  # the field of states with closed chunks, which alone have the tensors behind ALWAYS


def save_states(path: str | Path, states: Mapping[str, State], *, model: str = "") -> None:
    """Write states, say one for each layer of a model, to one safetensors file; atomically.

    A reader, and one of several writers of one file, sees what one writer wrote as a whole: the last one wins.

    Args:
        path: the file, replaced as a whole where it exists.
        states: by name; their tensors keep shape, dtype and bits.
        model: any text that says which model they belong to (a name and a hash of its weights, say).

    Raises:
        ValueError: `states` is empty or no mapping from text to states.
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

    check_path(path)
    check_states(states)
    if not isinstance(model, str):
        raise ValueError(f"model must be a text, got {type(model).__name__}")
    if not states:
        raise ValueError("states is empty: there is nothing to save")
    tensors = {
        f"{name}.{part}": getattr(state, part).detach().cpu().contiguous().clone()
        for name, state in states.items()
        for part in TENSORS
        if getattr(state, part) is not None
    }
    fields = {
        name: {field: getattr(state, field) for field in (*FIELDS, *[CLOSED] * bool(state.closed))}
        for name, state in states.items()
    }
    told = {"format": FORMAT, "model": model, "states": json.dumps(fields)}
    # A name that nobody else writes to, or can have put a link at.
    unfinished = Path(f"{path}.{secrets.token_hex(16)}.tmp")
    try:
        save_file(tensors, unfinished, {**told, "sha256": _digest(tensors, told)})
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # or a machine that fails leaves the new name and no content
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
    from safetensors import SafetensorError
    from safetensors.torch import load

    check_path(path)
    device = check_device(device)
    if like is not None and not (isinstance(like, Mapping) and all(isinstance(x, State) for x in like.values())):
        raise ValueError("like must be a mapping from names to states")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    # Read once: safetensors opens a file by its name twice, and in between another writer may have replaced it.
    content = Path(path).read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, cut short, or no safetensors file: {error}") from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    told: dict[str, str] = header.get("__metadata__") or {}
    if told.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of save_states: its format is {told.get('format')!r}, wanted {FORMAT!r}")
    for field in ("sha256", "model", "states"):
        if field not in told:
            raise ValueError(f"{path} is no file of save_states, or damaged: its header has no {field!r}")
    if told.pop("sha256") != _digest(tensors, told):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    if model is not None and told["model"] != model:
        raise ValueError(f"{path} holds states of the model {told['model']!r}, wanted {model!r}")
    states = _states(path, told["states"], tensors)
    if like is not None and set(like) != set(states):
        raise ValueError(f"{path} holds the states {sorted(states)}, wanted {sorted(like)}")
    for name, expected in (like or {}).items():
        try:
            check_like(states[name], expected)
        except ValueError as error:
            raise ValueError(f"{path}, state {name!r}: {error}") from None
    return {name: state.to(device) for name, state in states.items()}


def _states(path: str | Path, told: str, tensors: Mapping[str, Tensor]) -> dict[str, State]:
    """The states of a file that somebody may have made by hand."""
    try:
        made = json.loads(told)
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict) or not all(isinstance(fields, dict) for fields in made.values()):
        raise ValueError(f"{path}: what its header says of the states is no table of them")
    needed, known = ({f"{name}.{part}" for name in made for part in parts} for parts in (ALWAYS, TENSORS))
    if missing := needed - set(tensors):
        raise ValueError(f"{path}: its states have no tensor {min(missing)!r}")
    if strange := set(tensors) - known:
        raise ValueError(f"{path}: its tensor {min(strange)!r} is of no state")
    states = {}
    for name, fields in made.items():
        for field in FIELDS:
            if field not in fields:
                raise ValueError(f"{path}, state {name!r}: its header does not say {field!r}")
        if not set(fields) <= {*FIELDS, CLOSED}:
            raise ValueError(f"{path}, state {name!r}: its header says {sorted(fields)}, wanted {sorted(FIELDS)}")
        try:
            parts: dict[str, Any] = {part: tensors[f"{name}.{part}"] for part in TENSORS if f"{name}.{part}" in tensors}
            states[name] = State(**parts, **fields)
            check_whole("the state", states[name])
        except ValueError as error:
            raise ValueError(f"{path}, state {name!r}: {error}") from None
    return states


def _digest(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    """Over every bit that counts: what the states say of themselves, and their tensors."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: numpy has no bf16.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["load_states", "save_states"]
