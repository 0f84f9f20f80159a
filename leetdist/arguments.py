"""One argument as one plain value of Python's, or a ValueError that names it."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

TILE_LIMIT = 1 << 30  # that a caller may name: tokens in a tile are counted in 32 bits


def as_float(name: str, value: Any) -> Any:
    """A Python float for any real number but a bool; NumPy's too. (While torch.compile traces, a symbol of one.)"""
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = "; a tensor's value is its .item()" if isinstance(value, Tensor) else ""
        raise ValueError(f"{name} must be a finite number, got {value!r}{hint}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got {value!r}") from None


def as_int(name: str, value: Any, wanted: str = "a whole number") -> Any:
    """A Python int for any whole number but a bool; NumPy's too."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:  # PyTorch's are no larger
        raise ValueError(f"{name} must be {wanted}, got {value!r}, which 64 bits do not hold")
    return number


def as_tile(value: Any, wanted: str = "a power of two of at least 16 tokens, or None") -> int:
    """The length of a tile, in tokens, as a Python int."""
    tile: int = as_int("tile", value, wanted)
    if tile < 16 or tile & (tile - 1):
        raise ValueError(f"tile must be {wanted}, got {tile!r}")
    if tile > TILE_LIMIT:
        raise ValueError(f"tile must be a power of two of at most {TILE_LIMIT:,} tokens, or None, got {tile!r}")
    return tile


def as_str(name: str, value: Any, wanted: str = "a string") -> str:
    """A plain string."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return str.__str__(value)


def as_bool(name: str, value: Any) -> bool:
    """A Python bool; NumPy's is one too."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def as_name(name: str, value: Any, names: Iterable[str | None]) -> Any:
    """One of some names, of which one may be None; a plain string."""
    if not (value is None or isinstance(value, str)) or value not in (names := tuple(names)):
        shown = ", ".join("None" if x is None else x for x in names)
        raise ValueError(f"{name} must be one of {shown}, got {value!r}")
    return None if value is None else str.__str__(value)


def check_device(device: Any) -> torch.device:
    """A device, with its number."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"device must be a device that is there, got {device!r}: {error}") from None


def check_plain(name: str, x: Any, wanted: str = "a tensor") -> None:
    """A tensor that holds its values in memory, one after the other at its strides."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be {wanted}, got {type(x).__name__}")
    if not is_plain(x):
        hint = "; pass its .to_local()" if hasattr(x, "to_local") else ""
        raise ValueError(f"{name} must be a plain tensor, got a {type(x).__name__}{hint}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor with strides, got a {kind.removeprefix('_')} one")
    if x.is_quantized:
        raise ValueError(f"{name} must be a floating tensor, got a quantized one, {x.dtype}")


def in_memory(*given: Tensor | None) -> tuple[Any, ...]:
    """Each with its values as they lie in memory, for kernels that read it: a view can stand for their negatives."""
    return tuple([x.resolve_neg() if x is not None and x.is_neg() else x for x in given])


def for_autograd(x: Tensor) -> Tensor:
    """x, or a copy of one made in inference mode, of which autograd keeps none."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    return x.clone() if torch.is_grad_enabled() else x


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for what is on a device (PyTorch knows of none on the meta device, and raises)."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operations compute in the dtypes of what they are given."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def transformed() -> bool:
    """Whether torch.func's transforms or forward mode are at work, which a torch.autograd.Function has no rules for."""
    if torch.compiler.is_compiling():  # Dynamo has its own
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# Types that are tensors and nothing else, for a look that is quicker than `is_plain`.
IN_MEMORY = frozenset((Tensor, torch.nn.Parameter))


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor of numbers in memory, or of a subclass that only adds to one; torch's fakes, which stand
    for one while a graph is traced, pass."""
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return True
    fake = type(x).__module__ in ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")
    return fake or (is_memory(x) and not torch.nn.parameter.is_lazy(x))


def is_readable(x: Tensor) -> bool:
    """Whether looking at the values of x costs little: not on a GPU, and not where it is traced, mapped or a fake."""
    if torch.compiler.is_compiling() or not x.is_cpu or type(x) not in IN_MEMORY:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_memory(x: Tensor) -> bool:
    """Whether x's operations are those of ordinary tensors."""
    return bool(type(x).__torch_dispatch__ is Tensor.__torch_dispatch__)
