"""Passes of a group whose states hosts pass on are recorded and repeated too: rehearsed on the CPU, with PyTorch's
kernels as launches that know nothing but addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import leetdist
from helpers import run_ranks, values
from leetdist.kernels.common import recording
from leetdist.operators.constant_decay import ConstantDecay
from leetdist.sequence.group import resolve
from leetdist.sequence.p2p import PointToPoint
from leetdist.sequence.virtual import VirtualGroup

replay = pytest.importorskip("leetdist.kernels.common.replay")
BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
CALLS = 4  # the second is recorded


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
    def method(self: ConstantDecay, *args: Any, **kwargs: Any) -> Any:
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


@contextmanager
def rehearsed() -> Iterator[None]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from common import idle

        for name in idle.STEPS:
            patch.setattr(ConstantDecay, name, as_launch(getattr(ConstantDecay, name)))
        patch.setattr(replay, "_once", {})
        patch.setattr(replay, "_kinds", {})
        stack.enter_context(idle.rehearsed())
        yield


def results(group: Any, decay: Tensor, seed: int, **options: Any) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    whole = [torch.randn(1, 2, 192, 16, generator=draw) for _ in range(4)]
    q, k, v, do = (leetdist.shard_sequence(x, 2, group, tile=32) for x in whole)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = leetdist.linear_attention(*leaves, decay, group=group, tile=32, method="block", **options)
    grads = torch.autograd.grad(o, [*leaves, decay] if decay.requires_grad else leaves, do)
    return [o.detach(), *grads]


def learnt(values: list[float]) -> Tensor:
    return torch.tensor(values, requires_grad=True)


DECAYS = {
    "slow": torch.tensor([-0.01, -0.1]),
    "one forgets": torch.tensor([-0.1, -4.0]),
    "learnt": learnt([-0.1, -4.0]),
}


def repeated(group: Any) -> list[str]:
    """What differs from one device, call by call; and the number of passes that were repeated."""
    found = []
    for name, decay in DECAYS.items():
        for call in range(CALLS):
            ours, one = results(group, decay, call), results(None, decay, call)
            for number, (x, y) in enumerate(zip(ours, one, strict=True)):
                if y.ndim == 1:  # of log_decay: the sum over the ranks
                    same = torch.equal(x, y if group.rank == 0 else torch.zeros_like(y))
                else:
                    same = torch.equal(x, leetdist.shard_sequence(y, 2, group, tile=32))
                if not same:
                    found.append(f"{name}: call {call}, result {number}")
    return found


def count(patch: pytest.MonkeyPatch) -> list[int]:
    """How many times launches were repeated under a group, and how many messages passed on by that."""
    counted = [0, 0]
    real, message = replay.Replay.__call__, replay.Message

    def called(self: Any, *args: Any) -> Any:
        passed = sum(isinstance(action, message) for action in self.actions)
        counted[0] += passed > 0
        counted[1] += passed
        return real(self, *args)

    patch.setattr(replay.Replay, "__call__", called)
    return counted


@pytest.mark.real_empty
def test_virtual_ranks_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualGroup, "place", lambda self: ())
    counted = count(monkeypatch)
    with rehearsed():
        assert leetdist.virtual_ranks(repeated, 3) == [[]] * 3
    passes = 3 * 2 * (CALLS - 2) * len(DECAYS)
    assert counted == [passes, 2 * 4 * (CALLS - 2) * len(DECAYS)]  # four messages leave, and come, a pass


def over_gloo(rank: int) -> tuple[list[str], list[int]]:
    transport = resolve(dist.group.WORLD)
    assert isinstance(transport, PointToPoint)
    transport.staged = False  # as NCCL, which is given its tensors where they are
    with pytest.MonkeyPatch.context() as patch, rehearsed():
        patch.setattr(transport, "_capturing", lambda: False)
        counted = count(patch)
        return repeated(transport), counted


def test_processes_repeat() -> None:
    for found, counted in values(run_ranks(over_gloo, 2)):
        assert found == []
        assert counted == [2 * (CALLS - 2) * len(DECAYS)] * 2
