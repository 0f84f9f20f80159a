"""The benchmark: a wrong result gets no time, floors are what they say, and results can be read back."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    """Its modules, which are scripts beside each other and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = [f"common.{name}" for name in ("cases", "contestants", "everyone", "measure", "report", "warm")]
    names += ["run", "leetdecoding", "suites.leetdecoding.report", "suites.gated", "suites.map"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name.removeprefix("common."): importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def small(benchmarks):
    return benchmarks["cases"].Case(1, 100, heads=2, dk=16, dv=8, dtype="fp32")


def measured(benchmarks, contestants, which="forward"):
    return benchmarks["measure"].run_case(
        "test", small(benchmarks), which, contestants, "cpu", 1e9, 2, lambda text: None
    )


@pytest.mark.parametrize("which", ["forward", "forward + backward"])
def test_a_wrong_result_gets_no_time(benchmarks, which):
    ours = benchmarks["contestants"].Ours

    class Wrong(ours):
        name = "wrong"

        def forward(self, x):
            return super().forward(x) * 1.01

    class Unwritten(ours):
        name = "unwritten"

        def forward(self, x):
            return super().forward(x) + 0 * torch.empty_like(x.v)

    right, wrong, unwritten = measured(benchmarks, [ours(), Wrong(), Unwritten()], which)
    assert right.milliseconds is not None
    assert right.error < 1e-6
    assert wrong.milliseconds is None
    assert "wrong" in wrong.note
    if which == "forward":
        assert unwritten.milliseconds is None


def test_a_failure_is_a_line_of_the_table(benchmarks):
    class Fails(benchmarks["contestants"].Ours):
        name = "fails"

        def forward(self, x):
            raise RuntimeError("no such kernel")

    results = measured(benchmarks, [Fails()])
    assert "no such kernel" in benchmarks["report"].table(results)


def test_results_can_be_read_back(benchmarks, tmp_path):
    results = measured(benchmarks, [benchmarks["contestants"].Ours()])
    facts = benchmarks["report"].machine("cpu", 1e9)
    files = benchmarks["report"].save(results, facts, tmp_path, "test", plots=False)
    document = json.loads(files[0].read_text())
    assert document["results"][0]["milliseconds"] == results[0].milliseconds
    with files[1].open() as file:
        assert [row["contestant"] for row in csv.DictReader(file)] == ["leetdist"]


def test_warming_up_runs_each_kind_of_call_once(benchmarks):
    ours, case = benchmarks["contestants"].Ours(), small(benchmarks)
    wrong = benchmarks["contestants"].Fla("chunk")
    calls = [(ours, case, "forward", "cpu"), (ours, case, "forward", "cpu"), (wrong, case, "forward", "cpu")]
    assert benchmarks["warm"].warm(calls, 60).startswith("1 of 2 kinds of calls warmed up")


def test_floors_count_every_tensor_once(benchmarks):
    case = benchmarks["cases"].Case(2, 10, heads=3, dk=4, dv=5, dtype="bf16")
    q = k = 2 * 10 * 3 * 4 * 2
    v = o = 2 * 10 * 3 * 5 * 2
    assert case.floor_bytes("forward") == q + k + v + o
    # q, k, v and do are read, o is written, and so are dq, dk and dv; the backward reads q, k, v and do again.
    assert case.floor_bytes("forward + backward") == (q + k + v + o) + (q + k + v + o) + (q + k + v)


def test_a_decay_a_token_is_checked_with_its_gradient(benchmarks):
    """Of all heads of a group; floors count what groups share once."""
    ours, cases = benchmarks["contestants"].Ours, benchmarks["cases"]

    class Forgets(ours):
        name = "wrong"

        def gradients(self, x, do):
            *others, decays = super().gradients(x, do)
            return (*others, decays * 1.1)

    case = cases.Case(2, 100, heads=4, dk=16, dv=8, dtype="fp32", decay="token", groups=2)
    options = {"device": "cpu", "bandwidth": 1e9, "rounds": 1, "say": lambda text: None}
    run_case = benchmarks["measure"].run_case
    right, wrong = run_case("test", case, "forward + backward", [ours(), Forgets()], **options)
    assert right.error < 1e-6
    assert "wrong" in wrong.note
    assert case.floor_bytes("forward") == 2 * 100 * 4 * (2 * 2 * 16 + 2 * 4 * 8 + 4)
    (step,) = run_case("test", cases.replace(case, tokens=1, passes=("step",)), "step", [ours()], **options)
    assert step.error < 1e-6


@pytest.mark.parametrize("which", ["forward", "forward + backward"])
@pytest.mark.parametrize("gated", [False, True])
def test_scans_are_checked_with_what_is_around_them(benchmarks, gated, which):
    """Their floor has the tensors that D and z add; a scan is compared with its like alone."""
    suite = benchmarks["suites.gated"]

    class Ungated(suite.OurMamba):
        name, ours = "wrong", False

        def __init__(self):
            super().__init__(gated=gated)

        def call(self, leaves):
            return super().call(leaves) * 1.1

    case = benchmarks["cases"].replace(suite.MAMBA, tokens=100, heads=4, dk=16, dv=8, groups=2, dtype="fp32")
    contestants = [suite.OurMamba(gated=gated), suite.OurMamba(gated=not gated), Ungated()]
    run_case = benchmarks["measure"].run_case
    right, other, wrong = run_case("test", case, which, contestants, "cpu", 1e9, 1, lambda text: None)
    assert max(right.error, other.error) < 2e-6
    assert "wrong" in wrong.note
    assert right.vs_peer is other.vs_peer is None
    more = 100 * 4 * 8 * 4 * (1 if which == "forward" else 3)
    assert abs(right.floor_ms - other.floor_ms) == pytest.approx(more / 1e6)


def test_who_launches_elsewhere_is_timed_until_it_is_done(benchmarks):
    ours = benchmarks["contestants"].Ours

    class Elsewhere(ours):
        name, ours, waits, left = "elsewhere", False, True, 0

        def launch(self, which, x):
            self.left += 1

        def wait(self):
            time.sleep(0.02 * self.left)
            self.left = 0

    here, elsewhere = measured(benchmarks, [ours(), Elsewhere()])
    assert elsewhere.milliseconds == pytest.approx(20, rel=0.5)
    assert here.vs_peer == pytest.approx(elsewhere.milliseconds / here.milliseconds)


def test_every_case_has_its_own_name(benchmarks):
    for _, cases in benchmarks["run"].SUITES.values():
        assert len({case.name for case in cases}) == len(cases)
    assert "lengths" in benchmarks["run"].listing()


@pytest.mark.parametrize("repeats", [1, 3, 9, 10, 20])
def test_times_are_of_one_call(benchmarks, repeats, monkeypatch):
    """With a device whose clock moves by 3 ms a call, 7 ms for what it is kept busy with."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, later):
            return later.at - self.at

    def pass_time(milliseconds):
        clock[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: pass_time(7.0))
    times = benchmarks["leetdecoding"]._times
    for busy in (0.0, 1.0):
        clock[0] = 0.0
        found = list(times(lambda: pass_time(3.0), repeats, torch.device("cuda"), busy))
        assert found == [3.0] * len(found) != []
        assert clock[0] == 3.0 * repeats + (7.0 if busy else 0.0)


def test_auto_is_compared_with_the_best_by_each_clock(benchmarks):
    cell, compare = (
        benchmarks["suites.leetdecoding.report"].Cell,
        benchmarks["suites.leetdecoding.report"].auto_against_best,
    )
    shape = {"dtype": "fp16", "batch": 1, "tokens": 128, "training": False, "heads": 32}
    cells = [
        cell("leetdist auto", **shape, milliseconds=0.060, device_milliseconds=0.020),
        cell("leetdist block", **shape, milliseconds=0.050, device_milliseconds=0.025),
        cell("leetdist vanilla", **shape, milliseconds=0.040, device_milliseconds=0.010),
        cell("leetdist fleet", **shape, milliseconds=0.010, device_milliseconds=0.005, note="wrong"),
    ]
    found = {kind: report["worst"] for kind, report in compare(cells).items()}
    assert found == pytest.approx(
        {"all, in a row": 1.5, "all, on the device": 2.0, "sharded, in a row": 1.2, "sharded, on the device": 0.8}
    )
    without = [cell("leetdist auto", **shape, milliseconds=1.0), cell("leetdist block", **shape, milliseconds=1.0)]
    assert set(compare(without)) == {"all, in a row", "sharded, in a row"}


def test_costs_are_fitted(benchmarks, monkeypatch, tmp_path):
    """What times are made of comes back; of kernels that serve longer tiles, without the times of shorter ones."""
    report = benchmarks["suites.leetdecoding.report"]
    file, result = tmp_path / "costs.json", tmp_path / "result.json"
    shutil.copy(report.cost.FILE, file)
    monkeypatch.setattr(report.cost, "FILE", file)
    fixed, per_state, per_token = 500.0, 1500.0, 3.0  # us, ns, ns
    cells = []
    for dtype, tokens in itertools.product(("bf16", "fp32"), (128, 512, 1024, 8192, 65536, 262144)):
        tile = report.default_tile(tokens)
        work = 32 * (per_state * -(-tokens // tile) + per_token * tokens) * 1e-6
        milliseconds = 9.0 if dtype == "fp32" and tile < 64 else max(fixed * 1e-3, work)
        cells.append(report.Cell("leetdist block", dtype, 1, tokens, False, 32, milliseconds))
    about = {"device": "NVIDIA H200", "hopper": True, "commit": "0000000"}
    result.write_text(json.dumps(about | {"cells": [vars(cell) for cell in cells]}))
    report.fit([result])
    fitted = report.cost.load(file)["sm_90"]
    for half in (True, False):
        found = fitted[half]["block"]
        assert found.fixed == pytest.approx(fixed, rel=0.05)
        assert (found.per_state, found.per_token) == pytest.approx((per_state, per_token), rel=0.02)


def test_a_step_of_a_batch_is_checked(benchmarks):
    """Against its first entry."""
    cases, measure = benchmarks["cases"], benchmarks["measure"]
    case = cases.Case(3, 1, heads=2, dk=16, dv=8, dtype="fp32", passes=("step",))
    inputs = measure.draw(case, "cpu", 0)
    assert measure.check(benchmarks["contestants"].Ours(), case, "step", inputs) < 1e-6


@pytest.mark.parametrize(
    "special",
    [
        {"layout": "heads first"},
        {"layout": "fused", "dv": 16},
        {"documents": 7},
        {"documents": 7, "states": True},
        {"kv_heads": 1},
        {"kv_heads": 2, "learnt": True},
        {"states": True, "batch": 2},
        {"decay": "token", "documents": 3},
        {"options": (("tile", 32), ("method", "recursion"))},
    ],
)
@pytest.mark.parametrize("which", ["forward", "forward + backward"])
def test_every_situation_of_the_map_is_checked(benchmarks, special, which):
    """Right ones get times; one that is off a little does not, nor does one that leaves out what is special."""
    cases, ours = benchmarks["cases"], benchmarks["contestants"].Ours

    class Off(ours):
        name = "off"

        def gradients(self, x, do):
            *grads, last = super().gradients(x, do)
            return (*grads, last * 1.1)

        def forward(self, x):
            return super().forward(x) * 1.01

    class Peer(benchmarks["contestants"].Contestant):
        name, devices = "peer", ("cpu",)

    case = cases.Case(**{"batch": 1, "tokens": 100, "heads": 4, "dk": 16, "dv": 8, "dtype": "fp32", **special})
    right, off = benchmarks["measure"].run_case("test", case, which, [ours(), Off()], "cpu", 1e9, 1, lambda text: None)
    assert right.error < 1e-5
    assert right.milliseconds is not None
    assert "wrong" in off.note
    assert Peer().serves(case, which, "cpu") == (not case.special)


def test_the_map_is_drawn(benchmarks, tmp_path):
    pytest.importorskip("matplotlib")
    results = measured(benchmarks, [benchmarks["contestants"].Ours()])
    for result in results:
        result.details["situation"] = True
    files = benchmarks["report"].save(results, benchmarks["report"].machine("cpu", 1e9), tmp_path, "map", plots=True)
    assert [file.name for file in files] == ["map.json", "map.csv", "map-map.png"]
