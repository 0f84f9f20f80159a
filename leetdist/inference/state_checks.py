"""What is asked of states that somebody has kept: that they are whole, and belong to the operator at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leetdist.inference.state import State


def check_whole(name: str, state: Any) -> None:
    """A state that is used. One that is only compared with may be of parts that do not compute together."""
    if not isinstance(state, State):
        raise ValueError(f"{name} must be a State, got {type(state).__name__}")
    if not state.by_token and state.log_decay.shape[0] != state.boundary.shape[1]:
        raise ValueError(
            f"{name}: log_decay must have shape (H,) = ({state.boundary.shape[1]},), got {tuple(state.log_decay.shape)}"
        )
    if state.v.dtype != state.k.dtype:
        raise ValueError(f"{name}: v must have k's dtype, {state.k.dtype}, got {state.v.dtype}")
    if state.v.shape[3] != state.boundary.shape[3]:
        raise ValueError(
            f"{name}: v must have boundary's Dv = {state.boundary.shape[3]}, got shape {tuple(state.v.shape)}"
        )


def check_states(states: Any) -> None:
    """States by name, to save or to go on from."""
    if not isinstance(states, Mapping):
        raise ValueError(f"states must be a mapping from names to states, got {type(states).__name__}")
    for name, state in states.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"states must be named by text, got the name {name!r}")
        if not name.isprintable():  # a surrogate is no text that a file can hold
            raise ValueError(f"states must have printable names, got {name!r}")
        check_whole(f"states[{name!r}]", state)


def check_continues(state: State, **given: Any) -> None:
    """A stream that goes on from a state is given nothing that the state says."""
    check_whole("state", state)
    defaults = {"log_decay": None, "scale": 1.0, "tile": None, "method": "auto"}
    for name, value in given.items():
        if value is not defaults[name] and (isinstance(value, Tensor) or value != defaults[name]):
            raise ValueError(f"{name} must not be given with state, which has its own: it is {getattr(state, name)!r}")


def check_like(state: State, like: State) -> None:
    """A state of the same operator as `like`, of any batch and age."""
    for name in ("tile", "scale", "method"):
        got, wanted = getattr(state, name), getattr(like, name)
        if got != wanted:
            raise ValueError(f"the state was made with {name} {got}, wanted {wanted}")
    for name in ("boundary", "k", "v"):
        got, wanted = getattr(state, name), getattr(like, name)
        if (got.shape[1], got.shape[3]) != (wanted.shape[1], wanted.shape[3]):
            raise ValueError(
                f"the state has {got.shape[1]} heads of {got.shape[3]} in {name}, wanted {wanted.shape[1]} of "
                f"{wanted.shape[3]}"
            )
        if got.dtype != wanted.dtype:
            raise ValueError(f"the state's {name} is {got.dtype}, wanted {wanted.dtype}")
    if state.boundary.shape[2] != like.boundary.shape[2]:
        raise ValueError(f"the state has Dk = {state.boundary.shape[2]}, wanted {like.boundary.shape[2]}")
    if state.by_token != like.by_token:
        made, wanted = ("a decay a token" if x.by_token else "a decay a head" for x in (state, like))
        raise ValueError(f"the state was made with {made}, wanted {wanted}")
    if state.by_token:
        return
    if state.log_decay is not like.log_decay and not torch.equal(state.log_decay.cpu(), like.log_decay.cpu()):
        raise ValueError(
            f"the state was made with log_decay {_shown(state.log_decay)}, wanted {_shown(like.log_decay)}"
        )


def _shown(log_decay: Tensor) -> str:
    values = log_decay.tolist()
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
