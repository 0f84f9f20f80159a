"""Operators whose kernels compute nothing, and a group whose other rank answers at once: what is left of a sharded call
is the host's own part, and can be timed on any machine."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from leetdist.engine import plan, planning, repeats, values
from leetdist.kernels.common import sums
from leetdist.kernels.runtime import recording, repeated_launch, replay
from leetdist.mamba import checks, passes
from leetdist.mamba import repeats as scans
from leetdist.operators.constant_decay import ConstantDecay
from leetdist.operators.token_decay import TokenDecay
from leetdist.sequence.transport import Transport


def _launch(*tensors: Tensor | None) -> None:
    recording.note(recording.TritonLaunch(_IDLE, (1, 1, 1), tensors))


_IDLE = SimpleNamespace(launch=lambda *_: None)


class Kernels:
    """The steps of `leetdist.operators.base.Operator`: they take the memory that kernels take, and launch one kernel
    each, as those of a GPU do."""

    @staticmethod
    def added(self: Any, x: Any, tiles: Any, out: Tensor | None) -> Tensor:
        k, v = x["k"], x["v"]
        if out is None:
            heads = max(k.shape[1], v.shape[1])
            out = k.new_empty(k.shape[0], heads, tiles.count, k.shape[3], v.shape[3], dtype=torch.float32)
        _launch(k, v, x["log_decay"], out)
        return out

    @staticmethod
    def summaries(self: Any, x: Any, tiles: Any, *, to_end: bool, out: Tensor | None) -> Tensor:
        return Kernels.added(self, x, tiles, out)

    @staticmethod
    def state_gradients(
        self: Any, x: Any, states: Tensor, do: Tensor, tiles: Any, *, to_end: bool, out: Tensor | None
    ) -> Tensor:
        return Kernels.added(self, x, tiles, out)

    @staticmethod
    def fold(
        self: Any, keep: Tensor, states: Tensor, initial: Tensor | None, tiles: Any, *, reverse: bool, to_end: bool
    ) -> Tensor | None:
        batch, heads, _, dk, dv = states.shape
        final = states.new_empty(batch * tiles.num_segments, heads, dk, dv) if to_end else None
        _launch(states, initial, keep, final)
        return final

    @staticmethod
    def outputs(self: Any, x: Any, states: Tensor, tiles: Any, *, out: Tensor | None) -> Tensor:
        out = torch.empty_like(x["v"]) if out is None else out
        _launch(x["q"], x["k"], x["v"], states, x["log_decay"], out)
        return out

    @staticmethod
    def early_gradients(self: Any, x: Any, states: Tensor, do: Tensor, tiles: Any, places: Any, dtypes: Any) -> Any:
        return {"q": Kernels.gradient(x, "q", states, do, places)}

    @staticmethod
    def late_gradients(
        self: Any, x: Any, states: Tensor, ends: Tensor, do: Tensor, tiles: Any, places: Any, dtypes: Any, *, kept: Any
    ) -> Any:
        found = {name: Kernels.gradient(x, name, ends, do, places) for name in ("k", "v")}
        for name in places:  # a number a token each
            if name not in found:
                found[name] = torch.empty_like(x["log_decay"])
                _launch(x["v"], do, found[name])
        return found

    @staticmethod
    def gradient(x: Any, name: str, states: Tensor, do: Tensor, places: Any) -> Tensor:
        out = places[name]
        out = torch.empty_like(x[name]) if out is None else out
        _launch(x["q"], x["k"], x["v"], do, states, x["log_decay"], out)
        return out

    @staticmethod
    def head_gradients(
        self: Any, x: Any, states: Tensor, ends: Tensor, do: Tensor, tiles: Any, *, kept: Any
    ) -> dict[str, Tensor]:
        shares = states.new_empty(states.shape[:3], dtype=torch.float64)
        _launch(x["q"], x["k"], x["v"], do, states, ends, shares)
        return {"log_decay": shares}


def transitions(self: Any, x: Any, tiles: Any) -> Tensor:
    keep = x["log_decay"].new_empty(*x["log_decay"].shape[:2], tiles.count)
    _launch(x["log_decay"], keep)
    return keep


def as_on_hopper(self: TokenDecay, problem: Any, tokens: int) -> None:
    """Weights are taken by the operator's kernels, which make all gradients of what v is multiplied by."""
    _made(self, problem, tokens)
    if problem.weighted:
        self.fixed = ()
        self.by_token = {"skip": "weight"} if problem.skipped else {}


_made = TokenDecay.__init__


class Around:
    """What Mamba-2 does around it (leetdist.kernels.mamba.pytorch.scan), by name."""

    @staticmethod
    def scan_steps(dt: Tensor, A: Tensor, bias: Any, starts: Any, steps: Any) -> tuple[Tensor, Tensor]:
        batch, tokens, heads = dt.shape
        own, log_decay = (A.new_empty(batch, heads, tokens) for _ in range(2))
        _launch(dt, A, bias, own, log_decay)
        return own, log_decay

    @staticmethod
    def scan_steps_gradient(
        dt: Tensor, A: Tensor, bias: Any, starts: Any, grown: Any, dlog_decay: Tensor, steps: Any, needs: Any
    ) -> tuple[Tensor | None, ...]:
        ddt = torch.empty_like(dt)
        parts = [A.new_empty(4, dt.shape[2]) if wanted else None for wanted in needs[1:]]
        _launch(dt, A, bias, grown, dlog_decay, ddt, *parts)
        return ddt, *parts

    @staticmethod
    def scan_outputs(o: Tensor, x: Any, D: Any, z: Any, *, spent: bool = False) -> Tensor:
        y = o if spent else torch.empty(o.shape)
        _launch(o, x, D, z, y)
        return y

    @staticmethod
    def scan_outputs_gradient(dy: Tensor, o: Tensor, x: Any, D: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        do, dz = torch.empty(o.shape), torch.empty(z.shape)
        _launch(dy, o, x, D, z, do, dz)
        return do, dz


def sum_of_tiles(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    _launch(*parts, out)
    return out


def tiles_joined(parts: tuple[Tensor, ...]) -> Tensor:
    out = parts[0].new_empty(*parts[0].shape[:2], sum(x.shape[2] for x in parts))
    _launch(*parts, out)
    return out


STEPS = (
    "summaries", "fold", "outputs", "state_gradients", "early_gradients", "late_gradients", "head_gradients"
)  # fmt: skip


@contextmanager
def idle_kernels() -> Iterator[None]:
    with ExitStack() as stack:
        for name in STEPS:
            for operator in (ConstantDecay, TokenDecay):
                stack.enter_context(patch.object(operator, name, getattr(Kernels, name)))
        for name, own in (
            ("transitions", transitions),
            ("prepared", lambda self, x, backward: x),
            ("finished", lambda self, o, x: o),
            ("__init__", as_on_hopper),
        ):
            stack.enter_context(patch.object(TokenDecay, name, own))
        for module in (passes, scans):
            stack.enter_context(patch.object(module, "kernel", lambda step, *_: getattr(Around, step.__name__)))
        for stand_in in (sum_of_tiles, tiles_joined):
            stack.enter_context(patch.object(sums, stand_in.__name__, stand_in))
        yield


@contextmanager
def rehearsed() -> Iterator[None]:
    """Passes are recorded and repeated as on a GPU (leetdist.kernels.runtime.replay), with tensors on the CPU: of the
    kernels noted, `launch` is called, with addresses in place of tensors. For groups that have made no call before."""

    def handed(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Any:
        return SimpleNamespace(
            function=kernel.launch, before=grid, after=(), together=False, arguments=list(arguments),
            places=range(len(arguments)),
        )  # fmt: skip

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (replay.triton_launch, "direct", lambda device: True),
            (repeated_launch.triton_driver, "handed", handed),
            (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
            (torch._C, "_cuda_getCurrentStream", lambda index: (0, 0, 1)),
            (plan.Plan, "repeatable", True),
            (repeats, "_on_gpu", lambda x: True),
            (repeats, "reads_values", lambda x: False),
            (values, "reads_values", lambda x: False),
            (checks, "is_readable", lambda x: False),
        ):
            stack.enter_context(patch.object(owner, name, stand_in, create=True))
        for forget in (
            planning._plans.clear,
            planning._local_plan.cache_clear,
            scans.checked.clear,
        ):  # as plans know whether they repeat
            forget()
            stack.callback(forget)
        yield


class Echo(Transport):
    """Rank 1 of 2, whose neighbour has always said and sent what this one expects."""

    kind = "stand-in"
    name = "stand-in"
    rank, size = 1, 2

    def send(self, tensor: Tensor, to: int, what: str) -> None:
        pass

    def receive(self, tensor: Tensor, source: int, what: str) -> Tensor:
        return tensor

    def flush(self) -> None:
        pass

    def place(self) -> Hashable:
        return ()

    def swap_objects(self, mine: tuple[str, Any], what: str) -> list[tuple[str, Any]]:
        return [mine, mine]

    def alike(self, number: int, what: str) -> bool:
        return True

    def swap_header(self, header: list[int], to: int, source: int, what: str) -> list[int]:
        return header
