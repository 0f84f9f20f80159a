"""benchmarks/inference.py: what it writes, and that a wrong result gets no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import leetdist

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "inference", raising=False)
    import inference

    return inference


def test_results_are_written_and_drawn(inference: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sections = ["operator_decode", "contexts", "streamed"]
    command = ["inference.py", "--device", "cpu", "--quick", "--only", *sections, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    inference.main()
    results = json.loads((tmp_path / "inference-cpu.json").read_text())
    assert [row["batch"] for row in results["operator_decode"]] == [1, 4]
    assert all(row["step"] > 0 and row["verify 4 tokens"] > 0 for row in results["operator_decode"])
    assert [row["context"] for row in results["contexts"]] == [1024, 4096, 4096]
    assert [row["tokens"] for row in results["streamed"]] == [8192, 32768]
    assert (tmp_path / "inference-cpu.png").stat().st_size > 10_000


def test_a_wrong_result_gets_no_time(inference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = leetdist.linear_attention_steps

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return right(*arguments, **options) * 1.1

    monkeypatch.setattr(leetdist, "linear_attention_steps", wrong)
    with pytest.raises(RuntimeError, match=r"wrong result, no time: steps: relative error 1\.0e-01"):
        inference.operator_decode(inference.Bench("cpu", quick=True), 1)
