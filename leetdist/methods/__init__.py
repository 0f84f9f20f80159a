"""The local methods: how one rank computes its tiles. What happens between tiles and ranks is the same for all."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from leetdist.kernels.tiles import Tiles

if TYPE_CHECKING:
    from leetdist.problem import Problem

LARGEST_TRITON_HEAD = 256


class Kernels(Protocol):
    """The local primitives that a backend provides; leetdist.kernels.pytorch.block says what each computes."""

    def tile_states(
        self, b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles, *, reverse: bool, scale: float = 1.0
    ) -> Tensor: ...

    def fold(
        self, states: Tensor, initial: Tensor | None, log_decay: Tensor, tiles: Tiles, *, reverse: bool
    ) -> Tensor: ...

    def tile_outputs(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        states: Tensor,
        log_decay: Tensor,
        tiles: Tiles,
        *,
        reverse: bool,
        scale: float,
        state_scale: float,
        out_dtype: torch.dtype,
    ) -> Tensor: ...

    def decay_gradient(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        states: Tensor,
        state_grads: Tensor,
        log_decay: Tensor,
        tiles: Tiles,
        *,
        scale: float,
    ) -> Tensor: ...


def kernels_for(problem: Problem, *, sharded: bool) -> Kernels:
    """The kernels of the problem's method on its device."""
    if problem.method not in ("auto", "block"):
        raise ValueError(f"method {problem.method!r} is not there yet; 'auto' and 'block' are")
    if triton_serves(problem):
        from leetdist.kernels.triton import block as triton_block

        return cast(Kernels, triton_block)
    from leetdist.kernels.pytorch import block

    return cast(Kernels, block)


def triton_serves(problem: Problem) -> bool:
    """Triton's kernels run on NVIDIA GPUs from compute capability 8.0 on, in fp32, bf16 and fp16, up to 256 wide.

    LEETDIST_BACKEND=torch or =triton overrides (triton on the CPU takes its interpreter: TRITON_INTERPRET=1).
    """
    wanted = os.environ.get("LEETDIST_BACKEND")
    if wanted not in (None, "torch", "triton"):
        raise ValueError(f"LEETDIST_BACKEND must be torch or triton, got {wanted!r}")
    if wanted is not None:
        return wanted == "triton"
    return (
        problem.device.type == "cuda"
        and torch.version.hip is None
        and _capability(problem.device) >= (8, 0)
        and problem.dtype != torch.float64
        and max(problem.dk, problem.dv) <= LARGEST_TRITON_HEAD
        and importlib.util.find_spec("triton") is not None
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
