"""launch/demo.py, but for what the ranks' tests run of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from leetdist.launch import commands, demo


def test_what_saves_the_model_is_missed_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    options = commands.demo().parse_args(["--text", __file__, "--tokens", "64", "--out", str(tmp_path / "out")])
    nobody: Any = None  # no rank has begun
    with pytest.raises(SystemExit, match="safetensors is needed and not installed"):
        demo.run(options, nobody)
    assert not (tmp_path / "out").exists()
