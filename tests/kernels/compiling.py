"""What Triton's assembler says of a kernel compiled ahead of time, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton

# Bytes a thread may keep in local memory: a few addresses, beside 255 registers. Triton 3.6 and 3.8 keep to it; 3.7 and
# 3.9 do not, with 188 to 312 bytes in the outputs' kernel for 128 x 128 (tests/versions.txt says so in red).
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
