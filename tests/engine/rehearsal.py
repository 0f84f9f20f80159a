"""Calls whose launches are recorded and repeated, rehearsed on the CPU: PyTorch's kernels as launches that know nothing
but addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from leetdist.kernels.common import sums
from leetdist.kernels.runtime import recording
from leetdist.operators.constant_decay import ConstantDecay
from leetdist.operators.scalar_decay import ScalarDecay

replay = pytest.importorskip("leetdist.kernels.runtime.replay")
BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


class Kernel:
    """A step of the operator, as a launch: its tensors come as addresses."""

    def __init__(self, compute: Callable[..., None], tensors: list[Tensor]) -> None:
        self.compute = compute
        self.kinds = [(x.shape, x.stride(), x.dtype, x.untyped_storage().nbytes()) for x in tensors]

    def launch(self, *arguments: int) -> None:
        self.compute(*[self._at(*told) for told in zip(arguments[4:], self.kinds, strict=True)])

    @staticmethod
    def _at(address: int, kind: tuple[Any, ...]) -> Tensor:
        shape, strides, dtype, size = kind
        memory = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
        return memory.as_strided(shape, strides)


def as_launch(real: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: ScalarDecay, *args: Any, **kwargs: Any) -> Any:
        given, form = tree_flatten((args, kwargs))
        places = [place for place, x in enumerate(given) if isinstance(x, Tensor)]

        def compute(*tensors: Tensor) -> None:
            filled = dict(zip(places, tensors, strict=False))
            own_args, own_kwargs = tree_unflatten([filled.get(place, x) for place, x in enumerate(given)], form)
            results, _ = tree_flatten(real(self, *own_args, **own_kwargs))
            results = [x for x in results if x is not None]
            for out, result in zip(tensors[len(places) :], results, strict=True):
                out.copy_(result)

        with torch.no_grad():
            events = recording._thread.__dict__.get("events")
            recording.record_into(None)
            results, shape = tree_flatten(real(self, *args, **kwargs))
            recording.record_into(events)
            outs = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in results]
            recording.record_into(None)
            for out, result in zip(outs, results, strict=True):
                if out is not None:
                    out.copy_(result)
            recording.record_into(events)
        tensors = [*[given[place] for place in places], *[out for out in outs if out is not None]]
        recording.note(recording.TritonLaunch(Kernel(compute, tensors), (1, 1, 1), tuple(tensors)))
        return tree_unflatten(outs, shape)

    return method


def _without_self(function: Callable[..., Any], _: None, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def a_launch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, as a launch: its tensors come as addresses."""
    return partial(as_launch(partial(_without_self, function)), cast(Any, None))


@contextmanager
def rehearsed(operator: type[ScalarDecay] = ConstantDecay) -> Iterator[None]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from common import idle

        for name in (*idle.STEPS, *["transitions"] * (operator is not ConstantDecay)):
            patch.setattr(operator, name, as_launch(getattr(operator, name)))
        for name in ("sum_of_tiles", "tiles_joined"):
            patch.setattr(sums, name, a_launch(getattr(sums, name)))
        patch.setattr(replay, "_once", {})
        patch.setattr(replay, "_kinds", {})
        stack.enter_context(idle.rehearsed())
        yield
