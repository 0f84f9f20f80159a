"""How long a call takes on the GPU, by CUDA events."""

from __future__ import annotations

from collections.abc import Callable

import torch


def milliseconds(
    call: Callable[[], object], repeats: int, *, warm: int = 1, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Of `repeats` calls behind `warm` others, each waited for; `before` each of them is not timed."""
    times = []
    for _ in range(warm + repeats):
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times[warm:]
