"""The cost model, `leetdist.launch plan` and the trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
from leetdist.engine import trace
from leetdist.engine.planning import plan_call
from leetdist.launch import plan as plan_command
from leetdist.sequence import pipeline
from leetdist.sequence.group import resolve
from leetdist.sequence.pipeline import Job, Machine
from leetdist.testing.equality import Case, compute, make_tensors


def test_cost_model() -> None:
    job = Job(ranks=8, tokens=131_072, heads=32, dk=128, dv=128)
    assert job.state_bytes == 2 * 2**20
    assert sum(job.shards) == job.tokens
    machine = Machine()
    alone, _ = pipeline.single(job, machine)
    for lanes in (1, 2, 4):
        there = pipeline.forward(job, machine, lanes)
        assert alone.total / 8 < there.total < alone.total
        assert 0 <= there.exposed < there.total
        # A chain of one hop is never slower, an infinitely fast wire exposes next to nothing.
        assert pipeline.forward(job, machine, lanes, forgetting=1.0).total <= there.total
    free = Machine(hop=0.0, link=1e18, memory=1e18, launch=0.0)
    assert pipeline.forward(job, free, 1).exposed < 1e-9
    assert pipeline.lasp2(job, machine) < pipeline.lasp(job, machine)
    assert pipeline.best_lanes(1, 32, 32, 128, 128, job.shards, job.grid, "cpu") == 1
    assert pipeline.best_lanes(1, 32, 32, 128, 128, tuple([131_072] * 64), 4096, "cuda") > 1
    # The host launches lanes, unless a graph does.
    shape = (1, 32, 32, 128, 128, tuple([32_768] * 4), 4096, "cuda")
    assert pipeline.best_lanes(*shape) == 1
    assert pipeline.best_lanes(*shape, captured=True) > 1
    eager, captured = (pipeline.times(job, machine, 2, captured=captured) for captured in (False, True))
    assert eager[0] >= 2 * machine.host > captured[0] == pipeline.forward(job, machine, 2).total


DECAYS = [-0.01, -2.0, -200.0, 0.0]  # over a tile of 64: the second forgets, the third at once
LANES = [f"heads {head} to {head}" for head in range(4)]


def passed_on(transport: Any) -> dict[str, tuple[int, list[tuple[str, str]]]]:
    """Of one call, forward and backward: bytes that this rank sent, and its messages in order."""
    seen: list[tuple[str, str]] = []

    def noted(way: str, real: Any, place: int) -> Any:
        def note(*args: Any) -> Any:
            seen.append((way, next(lane for lane in LANES if lane in args[place])))
            return real(*args)

        return note

    found, begin = {}, transport.bytes_sent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "send_state", noted("out", transport.send_state, 2))
        patch.setattr(transport, "receive_state", noted("in", transport.receive_state, 3))
        q, k, v = (torch.randn(1, 4, 128, 16, requires_grad=True) for _ in range(3))
        o = leetdist.linear_attention(q, k, v, torch.tensor(DECAYS), group=transport, tile=64)
        found["forward"] = transport.bytes_sent - begin, seen.copy()
        seen.clear()
        o.sum().backward()
        found["backward"] = transport.bytes_sent - begin - found["forward"][0], seen.copy()
    return found


def on_gloo(rank: int) -> dict[str, Any]:
    transport = resolve(dist.group.WORLD)
    return {**passed_on(transport), "hops": planned(transport)}


def planned(transport: Any) -> tuple[int, ...]:
    q, k, v = (torch.randn(1, 4, 128, 16) for _ in range(3))
    options: dict[str, Any] = {
        "scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "method": "auto", "tile": 64
    }  # fmt: skip
    return plan_call(q, k, v, torch.tensor(DECAYS), transport=transport, **options).hops()


@pytest.mark.parametrize("kind", ["virtual", "gloo"])
def test_bytes_and_hops_are_those_predicted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks send, and how many of them wait for each other in a row, for every head; in both directions."""
    monkeypatch.setenv("LEETDIST_LANES", "4")  # a head each
    ranks = 4
    if kind == "gloo":
        found = values(run_ranks(on_gloo, ranks))
    else:
        found = leetdist.virtual_ranks(lambda group: {**passed_on(group), "hops": planned(group)}, ranks)
    sent = Job(ranks=ranks, tokens=512, heads=4, dk=16, dv=16, tile=64).sent_bytes(mute=1)
    assert [rank["forward"][0] for rank in found] == list(sent)
    assert [rank["backward"][0] for rank in reversed(found)] == list(sent)
    for direction, line in (("forward", found), ("backward", found[::-1])):
        longest = dict.fromkeys(LANES, 0)
        chain = longest.copy()
        for _, seen in (rank[direction] for rank in line):
            for lane in LANES:
                ways = [way for way, whose in seen if whose == lane]
                # Who sends before it has received starts a chain anew.
                chain[lane] = 0 if "out" not in ways else 1 + (chain[lane] if ways[0] == "in" else 0)
                longest[lane] = max(longest[lane], chain[lane])
        assert [tuple(longest.values())] * ranks == [rank["hops"] for rank in found] == [(3, 1, 0, 3)] * ranks


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
    trace.stop()
    assert not trace.on()
    events = json.loads((tmp_path / "trace.json").read_text() + "]")
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1, 2}
    assert {event["tid"] for event in spans} == {0, 1}
    for rank, names in ((0, {"send"}), (1, {"send", "receive"}), (2, {"receive"})):
        forward = [e["name"] for e in spans if e["pid"] == rank]
        assert names <= set(forward) >= {"tile states", "fold", "outputs", "dq", "dk, dv"}
    assert all(event["dur"] >= 0 for event in spans)


def test_trace_from_the_environment(tmp_path: Path) -> None:
    """All it takes is LEETDIST_TRACE: the file is written when the program ends."""
    script = """
import torch, leetdist
x = torch.randn(1, 2, 64, 16)
leetdist.virtual_ranks(lambda group: leetdist.linear_attention(x, x, x, group=group), 2)
"""
    environment = {**os.environ, "LEETDIST_TRACE": str(tmp_path / "t.json"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    events = json.loads((tmp_path / "t.json").read_text() + "]")
    assert {event["pid"] for event in events} == {0, 1}
    assert {event["name"] for event in events} >= {"tile states", "send", "receive", "outputs"}
