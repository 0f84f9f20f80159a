"""The operators that there are, by name. A new one is one class (leetdist.operators.base) and one line here, or a call
of `register`."""

from __future__ import annotations

import importlib

from leetdist.operators.base import Operator

# Name -> the class, or where it is: its kernels are imported when it is first used.
_operators: dict[str, type[Operator] | str] = {
    "constant_decay": "leetdist.operators.constant_decay.ConstantDecay",
    "token_decay": "leetdist.operators.token_decay.TokenDecay",
}


def register(name: str, operator: type[Operator]) -> None:
    """Make an operator known to `leetdist.engine.call.apply_operator`.

    Args:
        name: what it is called there.
        operator: the class (leetdist.operators.base); docs/extending.md has an example.

    Raises:
        ValueError: the name is another operator's.
    """
    if _operators.get(name, operator) is not operator:
        raise ValueError(f"operator {name!r} is registered already, as {_operators[name]}")
    _operators[name] = operator


def operator_named(name: str) -> type[Operator]:
    """The class of an operator; ValueError where none has that name."""
    found = _operators.get(name)
    if found is None:
        raise ValueError(f"operator must be one of {', '.join(_operators)}, got {name!r}")
    if isinstance(found, str):
        module, _, attribute = found.rpartition(".")
        loaded: type[Operator] = getattr(importlib.import_module(module), attribute)
        found = _operators[name] = loaded
    return found
