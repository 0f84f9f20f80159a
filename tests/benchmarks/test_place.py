"""Benchmarks leave what is committed alone, and GPU-sized ones say so on a machine without one."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are beside each other and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    "name", ["fleet", "inference", "leetdecoding", "minimax_layer", "scaling", "train_long", "training"]
)
def test_sizes_of_a_gpu_are_refused_without_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "minimax_layer":
        pytest.importorskip("transformers")
    if name == "train_long":
        pytest.importorskip("accelerate")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        script.main([]) if name == "scaling" else script.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{name}.py: these sizes are a GPU's, and torch ")
    assert said.count("\n") == 1


def test_results_go_where_git_does_not_look() -> None:
    place = importlib.import_module("common.place")
    assert ROOT / "runs" / "benchmarks" == place.RUNS
    assert "/runs/" in (ROOT / ".gitignore").read_text().splitlines()
    for path in (ROOT / "benchmarks").glob("*.py"):
        for default in re.findall(r'"--out".*?default=([^,]*)', path.read_text()):
            assert default.startswith("RUNS /"), f"{path.name}: {default}"
