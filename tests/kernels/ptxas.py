"""What ptxas says of a CUDA C++ kernel compiled as on a user's machine, on a machine without a GPU."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest

from leetdist.kernels.runtime import nvrtc

# CUDA 12's knows too little of Hopper.
NEEDS_NVRTC = pytest.mark.skipif((nvrtc.version() or (0, 0)) < (13, 0), reason="needs cuda-core and CUDA 13's NVRTC")
_said: dict[tuple[Any, ...], str] = {}


def report(source: str, architecture: str, defines: Iterable[tuple[str, int]]) -> str:
    """Of a file of kernels/, which must compile without warnings; what tests share is compiled once."""
    asked = source, architecture, tuple(sorted(defines))
    if asked not in _said:
        said = io.StringIO()
        nvrtc.compiled(nvrtc.text(source), architecture, asked[2], logs=said, ptxas_options=["-v"])
        assert "warning" not in said.getvalue().lower(), said.getvalue()
        _said[asked] = said.getvalue()
    return _said[asked]
