"""A run over several GPUs: every pass is one process's, and what they found is one result in the suite's order."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("common.spread")


def test_a_pass_is_taken_once(module: ModuleType, tmp_path: Path) -> None:
    assert [module.take(tmp_path, number) for number in (1, 2, 1)] == [True, True, False]


def test_two_processes_make_one_result(tmp_path: Path) -> None:
    """They begin with the last pass; the files are in the suite's order and have each pass once."""
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "cpu", "--only", "leetdist", "--case", "1 x 512"]
    command += ["--rounds", "1", "--gpus", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "0 of 2 passes left out" in done.stdout
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert [result["which"] for result in document["results"]] == ["forward", "forward + backward"]
    assert document["machine"]["command"].endswith(f"--gpus 2 --out {tmp_path}")
    assert not (tmp_path / "parts").exists()


def test_a_process_that_fails_is_counted(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other has found is there, with the GPU that each was given."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, pathlib\n"
        "gpu, out = os.environ['CUDA_VISIBLE_DEVICES'], pathlib.Path(sys.argv[-1])\n"
        "if gpu == '5': sys.exit('no such GPU')\n"
        "result = {'suite': 's', 'case': 'c', 'which': 'forward', 'contestant': sys.argv[1]}\n"
        "out.mkdir()\n"
        "(out / 's.json').write_text(json.dumps({'machine': {'copy_bytes_per_second': 7}, 'results': [result]}))\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert module.spread(2, tmp_path / "parts", ["given"]) == 1
    results, facts = module.joined(tmp_path / "parts", "s", [("s", "c", "forward")])
    assert [result.contestant for result in results] == ["given"]
    assert facts == {"copy_bytes_per_second": 7}
    assert module.joined(tmp_path / "parts", "another", []) == ([], {})
