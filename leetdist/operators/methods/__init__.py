"""The local methods: how one rank computes its tiles. What happens between tiles and ranks is the same for all."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.operators import cost
from leetdist.sequence.grid import default_tile

if TYPE_CHECKING:
    from leetdist.engine.problem import Problem

LARGEST_TRITON_HEAD = 256
# Tokens that are added to a state one by one. A sum of 4,096 such terms in fp32 is off by 2e-6 where nothing decays;
# one of 512 by 6e-7, and the fold of 256 such sums by 4e-7.
ONE_BY_ONE = 512
# Modules all of whose launches leetdist.kernels.common.recording sees; lightning's outputs are those of its base.
RECORDED = frozenset(
    (
        "leetdist.kernels.constant_decay.cuda.token_scan",
        "leetdist.kernels.constant_decay.triton.block",
        "leetdist.kernels.constant_decay.triton.fold",
        "leetdist.operators.methods.lightning",
    )
)


class Kernels(Protocol):
    """The local primitives that a backend provides; constant_decay.pytorch.block says what each computes."""

    def __hash__(self) -> int: ...

    def tile_states(
        self,
        b: Tensor,
        c: Tensor,
        log_decay: Tensor,
        tiles: Tiles,
        *,
        reverse: bool,
        scale: float = 1.0,
        to_end: bool = True,
        out: Tensor | None = None,
    ) -> Tensor: ...

    def fold(
        self,
        states: Tensor,
        initial: Tensor | None,
        log_decay: Tensor,
        tiles: Tiles,
        *,
        reverse: bool,
        to_end: bool = True,
    ) -> Tensor | None: ...

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
        out: Tensor | None = None,
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


@dataclass(frozen=True)
class Composed:
    """A method's own primitives beside the block method's. longest_tile: tokens that they may add up one by one."""

    tile_outputs: Callable[..., Tensor]
    tile_states: Callable[..., Tensor]
    fold: Callable[..., Tensor | None]
    decay_gradient: Callable[..., Tensor]
    longest_tile: int | None = None


@cache
def compose(
    base: Kernels,
    tile_outputs: Callable[..., Tensor],
    tile_states: Callable[..., Tensor] | None = None,
    *,
    longest_tile: int | None = None,
) -> Kernels:
    """The kernels of `base` with these in their stead. Plans are remembered by their kernels, so one object."""
    states = tile_states or base.tile_states
    return cast(Kernels, Composed(tile_outputs, states, base.fold, base.decay_gradient, longest_tile))


def part_of_tile(kernels: Kernels, tile: int) -> int:
    """The tile length that the kernels compute with: the call's, or where that is too long for them, a part of it, so
    that all that lies on the call's grid lies on theirs."""
    longest = getattr(kernels, "longest_tile", None)
    if longest is None or tile <= longest:
        return tile
    return next((part for part in range(longest, longest // 8, -1) if tile % part == 0), tile)


def kernels_for(problem: Problem, tokens: int) -> Kernels:
    """The kernels of the problem's method on its device; `tokens` are those of all ranks."""
    return _kernels_for(problem, tokens, os.environ.get("LEETDIST_BACKEND"))


@lru_cache(maxsize=512)
def _kernels_for(problem: Problem, tokens: int, _backend: str | None) -> Kernels:
    method = problem.method
    if method == "auto":
        method = choice_for(problem, tokens).method
    module = importlib.import_module(f"leetdist.operators.methods.{method}")
    return cast(Kernels, module.kernels(problem))


def choice_for(problem: Problem, tokens: int) -> cost.Choice:
    """What "auto" takes."""
    tile = problem.tile or default_tile(tokens)
    return cost.choose(problem, tile, cuda=cuda_serves(problem), hopper=hopper_serves(problem, tile))


def backend_of(kernels: Kernels) -> str:
    """The modules that the kernels are from, those of outputs first."""
    functions = (kernels.tile_outputs, kernels.tile_states, kernels.fold)
    return ", ".join(dict.fromkeys(function.__module__ for function in functions))


@cache
def writes_into_places(kernels: Kernels) -> bool:
    """Whether the kernels can write where they are told: several lanes fill one output."""
    return all("out" in inspect.signature(f).parameters for f in (kernels.tile_states, kernels.tile_outputs))


def launches_alone(kernels: Kernels) -> bool:
    """Whether the kernels of the two passes are all launched so that leetdist.kernels.common.recording sees it."""
    return RECORDED.issuperset(backend_of(kernels).split(", "))


def attention_on_one_device(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` of a method that knows no tiles: o and the final states. Document after document."""
    method = importlib.import_module(f"leetdist.operators.methods.{problem.method}")
    dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    share = problem.heads // problem.kv_heads
    decay = q.new_zeros(problem.heads) if log_decay is None else log_decay
    with torch.autocast(q.device.type, enabled=False):
        q, decay = q.to(dtype), decay.to(dtype)
        k, v = (x.to(dtype).repeat_interleave(share, 1) for x in (k, v))
        if problem.documents is None:
            o, state = method.attention(q, k, v, decay, initial_state)
        else:
            rows = [None] * problem.num_documents if initial_state is None else initial_state.split(1)
            spans = itertools.pairwise(problem.documents)
            parts = [
                method.attention(*(x[:, :, begin:end] for x in (q, k, v)), decay, row)
                for (begin, end), row in zip(spans, rows, strict=True)
            ]
            o = torch.cat([part[0] for part in parts], 2)
            state = torch.cat([part[1] for part in parts])
    return (problem.scale * o).to(problem.dtype), state


def cuda_serves(problem: Problem) -> bool:
    """CUDA C++ kernels need cuda-core, for NVRTC, and serve what Triton's do; LEETDIST_BACKEND set turns them off."""
    if os.environ.get("LEETDIST_BACKEND") is not None or not triton_serves(problem):
        return False
    from leetdist.kernels.common.loader import available

    return available()


def hopper_serves(problem: Problem, tile: int) -> bool:
    """Whether block has kernels written for Hopper for the problem, several times faster than the general ones."""
    whole = all(dim * problem.dtype.itemsize % 16 == 0 for dim in (problem.dk, problem.dv))
    fits = tile >= cost.SHORTEST_ON_HOPPER and whole and (problem.dtype != torch.float32 or problem.dk <= 128)
    return fits and triton_serves(problem) and problem.device.type == "cuda" and _capability(problem.device) == (9, 0)


def served_by(problem: Problem) -> str:
    """What there is to compute with on this rank, in words."""
    if not triton_serves(problem):
        return "PyTorch"
    name = "Triton"
    if cuda_serves(problem):
        from leetdist.kernels.common.loader import version

        name += f" and CUDA C++ by NVRTC {version()}"  # another may order instructions otherwise
    if problem.device.type != "cuda":
        return name
    major, minor = _capability(problem.device)
    return f"{name} on sm_{major}{minor}"


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
        and _has_triton()
    )


@cache
def _has_triton() -> bool:
    from leetdist.kernels.common.release import why_not_triton

    return why_not_triton() is None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
