"""The cost model, `leetdist.launch plan` and the trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import leetdist
from leetdist import trace
from leetdist.launch import plan as plan_command
from leetdist.sequence import cost
from leetdist.sequence.cost import Job, Machine
from leetdist.testing.equality import Case, compute, make_tensors


def test_cost_model() -> None:
    job = Job(ranks=8, tokens=131_072, heads=32, dk=128, dv=128)
    assert job.state_bytes == 2 * 2**20
    assert sum(job.shards) == job.tokens
    machine = Machine()
    alone, _ = cost.single(job, machine)
    for lanes in (1, 2, 4):
        there = cost.forward(job, machine, lanes)
        assert alone.total / 8 < there.total < alone.total
        assert 0 <= there.exposed < there.total
        # A chain of one hop is never slower, an infinitely fast wire exposes next to nothing.
        assert cost.forward(job, machine, lanes, forgetting=1.0).total <= there.total
    free = Machine(hop=0.0, link=1e18, memory=1e18, launch=0.0)
    assert cost.forward(job, free, 1).exposed < 1e-9
    assert cost.lasp2(job, machine) < cost.lasp(job, machine)
    assert cost.best_lanes(1, 32, 32, 128, 128, job.shards, job.grid, "cpu") == 1
    assert cost.best_lanes(1, 32, 32, 128, 128, tuple([131_072] * 64), 4096, "cuda") > 1
    # The host launches lanes, unless a graph does.
    shape = (1, 32, 32, 128, 128, tuple([32_768] * 4), 4096, "cuda")
    assert cost.best_lanes(*shape) == 1
    assert cost.best_lanes(*shape, captured=True) > 1
    eager, captured = (cost.times(job, machine, 2, captured=captured) for captured in (False, True))
    assert eager[0] >= 2 * machine.host > captured[0] == cost.forward(job, machine, 2).total


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    arguments = "--ranks 1024 --tokens 1048576 --heads 32 --dim 128 --layers 2 --slopes --set hop=2e-5 --plot"
    assert plan_command.main([*arguments.split(), str(picture)]) == 0
    text = capsys.readouterr().out
    assert "hop 2e-05" in text
    assert "1024  " in text
    assert picture.stat().st_size > 10_000
    with pytest.raises(SystemExit):
        plan_command.main(["--ranks", "2", "--tokens", "64", "--set", "speed=3"])
    assert "--set speed=3" in capsys.readouterr().err


def test_plan_measures_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command.main(["--ranks", "2", "--tokens", "4096", "--heads", "2", "--dim", "16", "--measure"]) == 0
    assert "this CPU" in capsys.readouterr().out


def test_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_LANES", "2")
    monkeypatch.setattr(trace, "_file", None)
    trace.start(str(tmp_path / "trace.json"))
    case = Case(256, 8, 8, heads=2, tile=64)
    tensors = make_tensors(case, torch.device("cpu"), 0)
    for _ in range(2):  # the second time, ranks append to what is there
        leetdist.virtual_ranks(lambda group: compute(case, tensors, group), 3)
        trace.save()
    events = json.loads((tmp_path / "trace.json").read_text() + "]")
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1, 2}
    assert {event["tid"] for event in spans} == {0, 1}
    for rank, names in ((0, {"send"}), (1, {"send", "receive"}), (2, {"receive"})):
        forward = [e["name"] for e in spans if e["pid"] == rank]
        assert names <= set(forward) >= {"tile states", "fold", "outputs", "dq", "dk, dv"}
    assert all(event["dur"] >= 0 for event in spans)
