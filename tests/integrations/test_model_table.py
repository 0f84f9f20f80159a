"""A dozen rows of model_table.py: what is exact stays exact, and what is refused, refused. All of it is run by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXACT = ("llama", "minimax", "gpt2", "opt", "qwen3_moe", "deepseek_v3", "mamba2", "xlstm")
REFUSED = ("gpt_oss", "gemma2", "mamba", "bloom", "roberta", "recurrent_gemma")


def test_rows_of_the_model_table() -> None:
    script = Path(__file__).with_name("model_table.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(script), *EXACT, *REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()[4:]
    words = ["exact"] * len(EXACT) + ["refused"] * len(REFUSED)
    for name, line, word in zip(EXACT + REFUSED, lines, words, strict=False):
        assert line[36:].split()[:6] == [word] * 6, f"{name}: {line}"
