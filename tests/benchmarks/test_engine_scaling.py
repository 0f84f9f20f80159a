"""The benchmark scripts of the engine, small, on the CPU: they have to run where nobody can debug them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import free_port

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_scaling(tmp_path: Path) -> None:
    sizes = "--device cpu --tokens 1024 --weak 256 --heads 2 --dim 16 --check-tokens 256 --repeat 2 --warmup 1 --fp32"
    sizes += " --in-a-row 2"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    out = run(*launcher, "benchmarks/scaling.py", *sizes.split(), "--dtype", "float32", "--out", str(tmp_path / "s"))
    assert "12 checks, 0 differences" in out  # --fp32
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["problems"] == report["red"] == []
    assert (tmp_path / "s.png").stat().st_size > 10_000
    assert report["hops"]["p2p"] > 0
    ours = {(r["scaling"], r["ranks"], r["call"]): r for r in report["rows"] if r["what"] == "leetdist"}
    assert len(ours) == 2 * 2 * 5
    assert ("strong", 2, "forward + backward, in a row, in the calling thread") in ours
    one_state = 4 * 2 * 16 * 16
    assert ours["strong", 2, "forward"]["bytes_sent"] == one_state  # of rank 0, which only sends
    assert ours["strong", 2, "forward"]["tokens"] == 1024
    assert ours["weak", 2, "forward"]["tokens"] == 512
    assert all(r["seconds"] > 0 and r["single"] > 0 for r in ours.values())
    assert {r["what"] for r in report["rows"] if r["what"] != "leetdist"} == {
        "all-gather, LASP-2's scheme",
        "serial ring, LASP's scheme",
    }


@pytest.mark.parametrize("operator", ["token", "mamba2"])
def test_scaling_of_a_decay_a_token(tmp_path: Path, operator: str) -> None:
    sizes = "--device cpu --tokens 512 --weak --heads 4 --dim 16 --check-tokens 256 --repeat 1 --warmup 1"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    options = ["--dtype", "float32", "--operator", operator, "--out", str(tmp_path / "s")]
    assert "6 checks, 0 differences" in run(*launcher, "benchmarks/scaling.py", *sizes.split(), *options)
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["problems"] == report["red"] == []
    rows = {(r["what"], r["ranks"], r["call"]): r for r in report["rows"]}
    assert set(rows) == {("leetdist", ranks, call) for ranks in (1, 2) for call in ("forward", "forward + backward")}
    sent = {"token": 4 * 4 * 16 * 16, "mamba2": 4 * 8 * 16 * 8}  # one state
    assert rows["leetdist", 2, "forward"]["bytes_sent"] == sent[operator]
    assert all(r["model"] is None and r["seconds"] > 0 for r in rows.values())


def test_overhead(tmp_path: Path) -> None:
    sizes = ["--tokens", "2048", "--heads", "2", "--dim", "16", "--ranks", "2", "--repeat", "1"]
    run("benchmarks/overhead.py", *sizes, "--out", str(tmp_path / "o.json"))
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [2, 2]
    assert all(row["ranks_s"] > 0 and row["single_s"] > 0 for row in rows)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=3", f"--master-port={free_port()}"]
    run(*launcher, "benchmarks/overhead.py", *sizes, "--out", str(tmp_path / "p.json"))
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["ranks are"] == "processes over gloo"
    assert [row["ranks"] for row in report["rows"]] == [3, 3]
    assert all(row["ranks_s"] > 0 and row["single_s"] > 0 for row in report["rows"])


def test_host(tmp_path: Path) -> None:
    run("benchmarks/host.py", "--repeat", "1", "--out", str(tmp_path / "h.json"))
    report = json.loads((tmp_path / "h.json").read_text())
    assert (report["transport"], report["ranks"]) == ("stand-in", 2)
    assert {row["who"] for row in report["rows"]} == {"one device", "group", "declared"}
    assert all(row["median_us"] >= row["least_us"] > 0 for row in report["rows"])
