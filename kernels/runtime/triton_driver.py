"""What Triton hands to the driver for a launch: asked of Triton's own launcher, whose form changes with its releases.

A compiled kernel's launcher (`compiled.run`) adds arguments of its own, makes a tensor map of each descriptor, and
calls a function in C. Here a copy of the launcher calls a function that only takes note. So what is found is what
Triton does, or nothing: where what it does is not recognised, whoever asks launches the usual way.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from leetdist.kernels.runtime import triton_release

# `compiled.run` takes these, and then the kernel's arguments; the last four had no names before Triton 3.7.
TAKEN = ["gridX", "gridY", "gridZ", "stream", "function"]
NAMED = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]

_STREAM, _MAP = object(), object()


# Kernels whose launches were not recognised, though the launcher is one that is known.
_unrecognised: list[str] = []


def why_not_repeated() -> str | None:
    """Why launches of Triton's kernels are not repeated as they are, in words; None where they are. (Those of kernels
    in CUDA C++ always are.)"""
    if _unrecognised:
        return f"Triton {triton_release.version()} hands {_unrecognised[0]} to the driver in a way that is not known"
    return _another_launcher()


@cache
def _another_launcher() -> str | None:
    missing = triton_release.why_not_triton()
    if missing is not None:
        return missing
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton interprets the kernels (TRITON_INTERPRET=1)"
    try:
        from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
    except ImportError as error:
        return f"Triton {triton.__version__} has another launcher: {error}"
    taken = [name for name in inspect.signature(CudaLauncher.__call__).parameters if name not in ("self", "args")]
    wrapped = list(inspect.signature(wrap_handle_tensordesc).parameters)
    if taken not in (TAKEN, TAKEN + NAMED) or wrapped != ["launcher", "signature", "tensordesc_meta"]:
        return f"Triton {triton.__version__}'s launcher takes other arguments than those of 3.5 to 3.9"
    return None


@dataclass(frozen=True)
class Handed:
    """The arguments of the driver's `function`: `before` the stream and `after` it, then the kernel's, which are one
    tuple (`together`) or not. `places`: where among those each of the launch's arguments begins; of a descriptor, its
    map, which `move` makes for its tensor at another address."""

    function: Callable[..., None]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    together: bool
    arguments: list[Any]
    places: list[int]
    _wrap: Callable[..., Any]
    _kinds: dict[int, tuple[str, Any]]

    def move(self, descriptor: Any, number: int, address: int) -> Any:
        """The map of the launch's argument `number`, `descriptor`, with its tensor at another address."""
        kind, meta = self._kinds[number]
        moved = copy.copy(descriptor)
        moved.base = SimpleNamespace(data_ptr=lambda: address)
        told: list[Any] = []
        base = (*self.before, _STREAM, *self.after)
        make = self._wrap(lambda *handed: told.append(handed[len(base) :]), {0: kind}, [meta])
        make(*base, (moved,)) if self.together else make(*base, moved)
        return told[0][0][0] if self.together else told[0][0]


def handed(compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Handed | None:
    """What is handed over for `compiled.run(*grid, stream, ..., *arguments)`; None if it is not understood, or if the
    launch takes memory of its own, as some kernels do."""
    try:
        run = compiled.run
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        return _handed(run, compiled, grid, arguments)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):  # another Triton
        _unrecognised.append(getattr(compiled, "name", "a kernel"))
        return None


def _handed(run: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Handed:
    wrap = sys.modules[type(run).__module__].wrap_handle_tensordesc
    signature = dict(enumerate(compiled.src.signature.values()))
    metas = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    told: list[tuple[Any, ...]] = []
    asked = copy.copy(run)
    asked.launch = wrap(lambda *handed: told.append(handed), signature, metas)
    asked(*grid, _STREAM, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    (given,) = told

    expected: list[Any] = []
    places: list[int] = []
    kinds: dict[int, tuple[str, Any]] = {}
    for number, x in enumerate(arguments):
        places.append(len(expected))
        if isinstance(x, Tensor) or not hasattr(x, "base"):
            expected.append(x)
        else:
            kinds[number] = signature[number], metas[len(kinds)]
            expected += [_MAP, *x.shape, *x.strides]
    together = isinstance(given[-1], tuple | list) and len(given[-1]) == len(expected)
    end = len(given) - (1 if together else len(expected))
    found = list(given[-1]) if together else list(given[end:])
    if len(found) != len(expected) or not all(map(_same, expected, found)):
        raise ValueError("other arguments")
    stream = given[:end].index(_STREAM)
    function = run.launch
    if kinds:  # it makes the maps, and calls the one that launches
        function = inspect.getclosurevars(function).nonlocals["launcher"]
    return Handed(function, given[:stream], given[stream + 1 : end], together, found, places, wrap, kinds)


def _same(expected: Any, found: Any) -> bool:
    return found is not None if expected is _MAP else found is expected or (type(found) is int and found == expected)
