"""What Triton's assembler says of a kernel compiled ahead of time, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton

# Bytes a thread may keep in local memory: a few addresses, beside 255 registers. Triton 3.6 to 3.9 keep to it in bf16,
# with 104 at most; the outputs' kernel for 128 x 128 in fp16, which is not compiled here, has 40 to 188.
SPILLS = 128


def assembled(
    compiled: Callable[[], Any], folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
) -> tuple[Any, str]:
    """What `compiled` returns and what ptxas said: the one that this Triton calls for the chip, with its options."""
    patch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    patch.setattr(triton.knobs.cache, "dir", str(folder))  # nothing is there yet, so ptxas is called
    capture.readouterr()
    result = compiled()
    return result, capture.readouterr().out


def spilled(said: str) -> int:
    return int(said.split("bytes stack frame,")[1].split("bytes spill stores")[0])
