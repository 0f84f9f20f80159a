"""What the host has to know of small tensors: the values of log_decay, and the boundaries of packed documents.

On the CPU they are read in every call, so that whoever changes them behind PyTorch's back (`.data`, NumPy's view of the
same memory) is served what they are now. Reading a GPU's would stop its stream, so a tensor there is read once, until
its version, memory, shape or strides change; what a result depends on is then compared on the GPU (`still`).
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.settings import variable
from leetdist.sequence.agreement import digest
from leetdist.sequence.documents import check_order


@dataclass(frozen=True)
class Decays:
    """The values of a log_decay."""

    values: tuple[float, ...]

    @cached_property
    def digest(self) -> int:
        return digest(struct.pack(f"{len(self.values)}d", *self.values))

    @cached_property
    def bad(self) -> int | None:
        """The first head whose value is no log-decay: NaN, or positive."""
        return next((head for head, value in enumerate(self.values) if not value <= 0), None)

    def forgetting(self, tokens: int, states: torch.dtype) -> list[int]:
        """Heads for which gamma^tokens is exactly 0 in the dtype of the states, however it is rounded: under half of
        the smallest positive number (e^-103.97 in fp32, e^-745.13 in fp64; kernels that flush denormals are at 0
        sooner)."""
        bound = forgetting_bound(states)
        return [head for head, value in enumerate(self.values) if value * tokens < bound]


def forgetting_bound(states: torch.dtype) -> float:
    """`exp` of anything less is 0 in the dtype of the states."""
    return -746.0 if states == torch.float64 else -105.0


@lru_cache(maxsize=512)
def _decays(values: tuple[float, ...]) -> Decays:
    return Decays(values)


# By identity: an ordinary weak dictionary compares keys with ==, which a tensor does elementwise.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_NOTHING: Any = (None, (), None)


def values_of(x: Tensor, *, read: bool = True) -> tuple[float, ...] | None:
    """The values of a small tensor; None where they are not known, and may not be read: `read` is False, or a CUDA
    graph is being captured."""
    if x.is_cpu:
        return tuple(x.tolist()) if read else None
    known, values, _ = _read.get(x, _NOTHING)
    if known == mark_of(x):
        return values
    if not read or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    values = tuple(x.tolist())
    remember(x, values)
    return values


def remember(x: Tensor, values: tuple[float, ...], copy: Tensor | None = None) -> None:
    """These are x's values, as it is now."""
    _read[x] = mark_of(x), values, copy


def never_read(log_decay: Tensor) -> bool:
    """Whether the values of a decay a head are not looked at, on any rank: one that is learnt on a GPU has others in
    each step, and to read them would stop its stream in each call. What is no log-decay makes NaN then
    (leetdist.engine.inputs), unless LEETDIST_CHECK_VALUES=1 asks for the reading."""
    return _on_gpu(log_decay) and log_decay.requires_grad and torch.is_grad_enabled() and not checks_values()


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def decays_of(log_decay: Tensor, *, read: bool = True) -> Decays | None:
    """The values of a log_decay, as `values_of`; None too where they are `never_read`."""
    if never_read(log_decay):
        return None
    values = values_of(log_decay, read=read)
    return None if values is None else _decays(values)


def bad_step(log_decay: Tensor, *, read: bool = True) -> tuple[int, ...] | None:
    """(batch entry, head, token) of the first value of a decay a token that is positive or NaN; None where there is
    none, or none is to be read: on a GPU only what LEETDIST_CHECK_VALUES=1 asks for, and outside of a capture."""
    if not read or not reads_values(log_decay):
        return None
    if log_decay.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    log_decay = log_decay.detach()
    if not log_decay.numel() or bool((log_decay <= 0).all()):
        return None
    return tuple((~(log_decay <= 0)).nonzero()[0].tolist())


def reads_values(log_decay: Tensor) -> bool:
    """Whether a call looks at the values of a decay a token."""
    return log_decay.is_cpu or checks_values()


def checks_values() -> bool:
    """LEETDIST_CHECK_VALUES: whether values on a GPU are read, which stops its stream in every call."""
    value = variable("LEETDIST_CHECK_VALUES")
    if value not in (None, "0", "1"):
        raise ValueError(f"LEETDIST_CHECK_VALUES must be 0 or 1, got {value!r}")
    return value == "1"


def boundaries_of(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The boundaries of packed documents as numbers; ValueError if they do not start at 0, or decrease."""
    known, boundaries, copy = _read.get(cu_seqlens, _NOTHING)
    if known == mark_of(cu_seqlens) and (cu_seqlens.device.type != "cpu" or torch.equal(cu_seqlens, copy)):
        return boundaries
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("cu_seqlens is read from the GPU, which no captured graph can: call once before with the same")
    boundaries = tuple(cu_seqlens.tolist())
    check_order(boundaries)
    remember(cu_seqlens, boundaries, cu_seqlens.clone())
    return boundaries


def still(log_decay: Tensor, cu_seqlens: Tensor | None, highest: tuple[float, ...] | None) -> Tensor:
    """log_decay, with NaN where the tensors on a GPU are no longer what the call's plan took them for: better than
    numbers that are wrong. A CUDA graph that has captured the call compares as well.

    highest: the largest value of each head for which the plan holds; None where it holds for all.
    """
    if cu_seqlens is not None and cu_seqlens.is_cuda:
        _, _, copy = _read[cu_seqlens]
        same = (cu_seqlens == copy).all().to(log_decay.device)
        log_decay = torch.where(same, log_decay, torch.nan)
    if highest is not None and _on_gpu(log_decay):
        limits = _on_device(highest, log_decay.dtype, log_decay.device)
        log_decay = torch.where(log_decay <= limits, log_decay, torch.nan)
    return log_decay


_limits: Memo[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = Memo(512)


def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor. A CUDA graph that is being captured can copy none from the host: it fills runs of equal
    ones, as often as it is launched, and nobody else reads them."""
    known = _limits.get((values, dtype, device))
    if known is not None:
        return known
    if _capturing():
        runs = [(value, len(list(run))) for value, run in groupby(values)]
        return torch.cat([torch.full((count,), value, dtype=dtype, device=device) for value, count in runs])
    with torch.inference_mode(False):  # it may be needed for training later
        made = _limits[values, dtype, device] = torch.tensor(values, dtype=dtype, device=device)
    return made


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def mark_of(x: Tensor) -> Hashable:
    """Another one where the tensor may have other values; those of an inference tensor change unseen."""
    version = None if x.is_inference() else x._version
    return version, x.data_ptr(), x.shape, x.stride(), x.dtype
