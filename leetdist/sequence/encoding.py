"""Objects between ranks as JSON: values only. A rank that is not what it seems can send wrong values, but no code, as
it could in a pickle.

None, bools, numbers, text, lists, tuples, dictionaries, dtypes, devices, a ValueError's words, and the data classes
that are marked `@plain`. Whatever else is asked for is a TypeError of the sender.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import torch

_Class = TypeVar("_Class", bound=type)
_plain: dict[str, type] = {}


def plain(cls: _Class) -> _Class:
    """Marks a data class that ranks may send each other; the classes of one program have names of their own."""
    assert is_dataclass(cls)
    assert _plain.setdefault(cls.__name__, cls) is cls, f"two plain classes are named {cls.__name__}"
    return cls


def encode(value: Any) -> bytes:
    return json.dumps(_told(value), separators=(",", ":")).encode()


def decode(data: bytes | bytearray) -> Any:
    """The value; ValueError where `data` is not what `encode` makes."""
    try:
        return _made(json.loads(data))
    except (KeyError, TypeError, AttributeError, RuntimeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"a message between ranks is damaged: {type(error).__name__}: {error}") from None


def _told(x: Any) -> Any:
    """x in what JSON has: an object with a single key says what it stands for."""
    if x is None or type(x) in (bool, int, float, str):
        return x
    if type(x) is list:
        return [_told(item) for item in x]
    if isinstance(x, tuple):  # torch.Size too
        return {"tuple": [_told(item) for item in x]}
    if type(x) is dict:
        return {"dict": [[_told(key), _told(value)] for key, value in x.items()]}
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, ValueError):
        return {"error": str(x)}
    if _plain.get(type(x).__name__) is type(x):
        return {type(x).__name__: [_told(getattr(x, field.name)) for field in fields(cast(Any, x))]}
    raise TypeError(f"ranks do not send each other a {type(x).__name__}: see leetdist.sequence.encoding")


def _made(x: Any) -> Any:
    if isinstance(x, list):
        return [_made(item) for item in x]
    if not isinstance(x, dict):
        return x
    [(kind, told)] = x.items()
    if kind == "dtype":
        dtype = getattr(torch, told)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"torch.{told} is no dtype")
        return dtype
    if kind == "device":
        return torch.device(told)
    if kind == "error":
        return ValueError(told)
    parts = [_made(item) for item in told]
    if kind == "tuple":
        return tuple(parts)
    if kind == "dict":
        return dict(parts)
    return _plain[kind](*parts)
