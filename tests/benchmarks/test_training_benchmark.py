"""benchmarks/training.py: rows of every kind on ranks of a CPU, and where the time of a traced step went."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_rows_of_one_rank_and_of_two(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "t.json"
    options = f"--model mini --tokens 512 --steps 2 --skip 1 --profile --layer 64 --repeat 1 --text {__file__}"
    command = [sys.executable, "benchmarks/training.py", "--ranks", "1", "2", "--only", "torchrun, DDP"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [*command, *options.split(), "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["ranks"], row["what"], row["tokens"]) for row in rows] == [
        (ranks, what, tokens) for ranks in (1, 2) for what, tokens in (("training", 512), ("layer", 64))
    ]
    one, two = rows[0], rows[2]
    assert two["first_loss"] == pytest.approx(one["first_loss"], rel=1e-5)
    assert two["tokens_per_s"] > 0
    assert "tokens/s, x " in done.stdout
    assert rows[3]["forward + backward ms"] > rows[3]["forward ms"] > 0


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("suites.training.spans")


def event(cat: str, name: str, begin: float, end: float, number: int) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "args": {"correlation": number}}


def test_the_parts_of_a_step_add_up(spans: Any) -> None:
    """A launch at 0 runs from 100; NCCL beside it and alone; hops; a gap of a late host, and one of the GPU's own; and
    a graph, whose launch nobody traces, before a kernel that was launched in time."""
    events = [
        event("cuda_runtime", "cudaLaunchKernel", 0, 5, 1),
        event("kernel", "tile_states", 100, 300, 1),
        event("cuda_runtime", "cudaLaunchKernelExC", 10, 15, 2),
        event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 200, 450, 2),
        event("cuda_driver", "cuLaunchKernelEx", 20, 25, 3),
        event("kernel", "_look", 400, 440, 3),
        event("kernel", "_wait", 440, 500, 3),
        event("cuda_runtime", "cudaLaunchKernel", 580, 585, 4),  # the GPU is idle since 500
        event("kernel", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", 600, 700, 4),
        event("kernel", "tile_outputs", 750, 800, 5),  # of a graph
        event("cuda_runtime", "cudaLaunchKernel", 690, 695, 6),
        event("kernel", "void at::native::vectorized_elementwise_kernel<4, f>(int)", 800, 1000, 6),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 1000, 1010, 7),
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": -50, "dur": 9000, "args": {}},
    ]
    found = spans.summary(events)
    assert found["step"] == 1.010
    assert found["parts"] == {
        "computing": 0.560, "NCCL alone": 0.150, "hops alone": 0.050, "host": 0.080, "between": 0.170
    }  # fmt: skip
    assert sum(found["parts"].values()) == pytest.approx(found["step"])
    assert found["groups"] == {
        "NCCL": 0.250, "attention": 0.250, "elementwise": 0.200, "hops": 0.100, "matrix products": 0.100,
        "copies": 0.010,
    }  # fmt: skip
    assert found["kernels"][0][1:] == [1, 0.25]
    assert found["launches"] == 8


def test_a_trace_without_kernels_has_no_summary(spans: Any) -> None:
    assert spans.summary([{"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 1, "args": {}}]) == {}
