"""Launching a kernel in Triton or Gluon, and launching it again.

Triton looks at every argument of every launch to find the compiled kernel that fits, which takes longer than a short
kernel runs. Here what it found is kept, under a key of what it looks at: types, alignments, the integers themselves.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
from torch import Tensor

from leetdist.kernels.runtime import recording, triton_release
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.triton_driver import why_not_repeated

if (_missing := triton_release.why_not_triton()) is not None:
    raise ImportError(f"leetdist's Triton kernels: {_missing}")

# Whether compiled kernels are launched without asking Triton; else in the usual way, always.
DIRECT = why_not_repeated() is None
# Compiled kernels. Integers are in the key, so a stream of ever new lengths would fill the memory.
_kept: Memo[tuple[Any, ...], Any] = Memo(4096)
_thread = threading.local()


def direct(device: torch.device) -> bool:
    """Whether kernels can be launched here and now without going to the device first, and nobody watches launches."""
    if (
        device.type != "cuda"
        or device.index != torch._C._cuda_getDevice()
        or triton.knobs.runtime.launch_enter_hook.calls
    ):
        return False
    bind(device)
    return True


def bind(device: torch.device) -> None:
    """A tensor map is made in the thread's current context, and a thread (of autograd, say) that has done nothing on
    the device yet has none: PyTorch's own kernels bind it."""
    known = _thread.__dict__.setdefault("devices", set())
    if device.index not in known:
        torch.zeros(1, device=device)
        known.add(device.index)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    *,
    enable_fp_fusion: bool = True,
    **options: int,
) -> None:
    """`kernel[grid](*arguments, **constants, **options)`; the kernel's constexpr parameters come last, in this order.

    Arguments are tensors, None, integers, floats, or (tensor descriptor) objects with a `key`. Whether products and
    sums are fused is always said, for bits depend on it: the default is the environment's, and changes in Triton 3.10.
    """
    options["enable_fp_fusion"] = enable_fp_fusion
    device = next(x for x in arguments if isinstance(x, Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, arguments, constants, **options)  # type: ignore[arg-type]
    if device.type == "cuda":
        bind(device)
    if not DIRECT or triton.knobs.runtime.launch_enter_hook.calls:  # a profiler wants to know
        if recording.noting():
            recording.note(recording.TritonLaunch(None, grid, arguments))
        kernel[grid](*arguments, **constants, **options)
        return None
    key = (kernel, device.index, *options.values(), *constants.values(), *map(_kind, arguments))
    compiled, new = _kept.get(key), False
    if compiled is None:
        compiled, new = kernel[grid](*arguments, **constants, **options), True
        _kept[key] = compiled
    grid, arguments = (*grid, *(1,) * (3 - len(grid))), (*arguments, *constants.values())
    if recording.noting():
        recording.note(recording.TritonLaunch(compiled, grid, arguments))
    if new:
        return None
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    compiled.run(
        *grid,
        stream,
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *arguments,
    )
    return None


def _kind(x: Any) -> Any:
    """What Triton compiles an argument's kernel for; integers stand for themselves, which is finer."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, float):
        return float
    return getattr(x, "key", x)
