"""python benchmarks/counters.py: hardware counters of the kernels behind the rows of the map that miss their aim.

Each row is called in a process of its own under Nsight Compute (`ncu`, which must be on the PATH), and the kernels of
one call, forward and backward, are replayed until all counters are read; `python benchmarks/run.py map` is what checks
their results. A kernel's time is its own, without neighbours, at a clock that no load has lowered. Rows are written as
they come.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.contestants import Ours
from common.measure import copy_bandwidth, draw
from common.place import RUNS, needs_gpu
from common.report import machine
from common.warm import warm
from suites.gated import MAMBA
from suites.map import PLAIN, SHORT, heads_of

LAST, LONGEST = 20.0, 70.0  # seconds of a row that begins as the time ends, and of any
WHICH = "forward + backward"
FP32 = heads_of(192, 128, dtype="fp32"), heads_of(256, heads=16, dtype="fp32")
ROWS = [
    PLAIN,
    *(replace(PLAIN, kv_heads=heads) for heads in (8, 1)),
    heads_of(256, heads=16),
    *(replace(SHORT, heads=8, dk=dk, dv=512) for dk in (256, 512)),
    replace(PLAIN, learnt=True),
    MAMBA,
    *(replace(case, tokens=32768) for case in FP32),  # of the map's 131,072 ncu takes more than a minute to replay one
    replace(PLAIN, batch=32, tokens=1024),
    replace(PLAIN, heads=1, tokens=2**20),
    replace(PLAIN, decay="none", dtype="fp16"),
]
PERCENT = {
    "tensor": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "xu": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
COUNTS = {
    "ns": "gpu__time_duration.sum",
    "hz": "smsp__cycles_elapsed.avg.per_second",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "registers": "launch__registers_per_thread",
}
LIMITS = [f"launch__occupancy_limit_{what}" for what in ("blocks", "registers", "shared_mem", "warps")]
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard"),
    *("sleeping", "tex_throttle", "wait"),
)


def kernels(log: str) -> list[dict[str, Any]]:
    """Of each kernel that ncu reports (--csv --page raw): its name, its counters, and the warps that stall while one
    issues, by what they wait for. A counter that this chip has not is None."""
    lines = log.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = []
    for row in csv.DictReader(line for line in lines[begin:] if line.startswith('"')):
        if not row["ID"]:  # the units
            continue

        def number(name: str, row: dict[str, str] = row) -> float | None:
            with contextlib.suppress(ValueError):
                return float(f"{float((row.get(name) or '').replace(',', '')):.4g}")
            return None

        stalls = {name: number(STALL.format(name)) or 0.0 for name in STALLS}
        limits = [limit for limit in map(number, LIMITS) if limit is not None]
        found.append(
            {"kernel": row["Kernel Name"].split("(")[0].split("<")[0].rpartition("::")[2].split()[-1]}
            | {name: row[name].replace(" ", "") for name in ("Grid Size", "Block Size")}
            | {name: number(metric) for name, metric in (COUNTS | PERCENT).items()}
            | {"blocks": min(limits, default=None)}
            | {"stalls": {name: warps for name, warps in stalls.items() if warps >= 0.05}}
        )
    return found


def words(kernel: dict[str, Any]) -> str:
    """A kernel's line."""

    def given(value: float | None, times: float = 1.0, form: str = ".0f") -> str:
        return "?" if value is None else format(value * times, form)

    rates = " ".join(f"{name} {given(kernel[name]):>2}" for name in PERCENT)
    worst = sorted(kernel["stalls"].items(), key=lambda stall: -stall[1])[:3]
    moved = None if None in (kernel["read"], kernel["written"]) else kernel["read"] + kernel["written"]
    return (
        f"{kernel['kernel'][:22]:22} {given(kernel['ns'], 1e-3):>5} us {given(kernel['hz'], 1e-9, '.2f')} GHz "
        f"{given(moved, 1e-9, '.2f'):>5} GB  %: {rates}  {given(kernel['registers'])} registers, "
        f"{given(kernel['blocks'])} x {kernel['Block Size'].strip('()').split(',')[0]} threads; "
        + ", ".join(f"{name} {warps:.1f}" for name, warps in worst)
    )


def begun(number: int, folder: Path) -> subprocess.Popen[bytes]:
    """ncu with a process that calls a row as soon as it is told to: what it imports until then takes seconds."""
    metrics = [*COUNTS.values(), *PERCENT.values(), *LIMITS, *map(STALL.format, STALLS)]
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--cache-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    command += ["--log-file", str(folder / f"{number}.csv"), "--metrics", ",".join(metrics)]
    command += [sys.executable, __file__, "--call", str(number), "--told", str(folder / f"{number}.told")]
    with (folder / f"{number}.said").open("wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def ended(process: subprocess.Popen[bytes], number: int, folder: Path, seconds: float) -> list[dict[str, Any]] | str:
    """The kernels of a row; or why there are none."""
    (folder / f"{number}.told").touch()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not done after {seconds:.0f} s"
    log, said = (folder / f"{number}.csv", folder / f"{number}.said")
    text = log.read_text() if log.exists() else ""
    whole = [*(line for line in text.splitlines() if line.startswith("==")), *said.read_text().splitlines()]
    wrong = [line for line in whole if "error" in line.lower()] or whole[-1:] or ["ncu said nothing"]
    return kernels(text) or "; ".join(wrong)[:400]


def call(number: int, told: Path) -> None:
    """The process under ncu."""
    ours, patience = Ours(), 6000
    while not told.exists():
        time.sleep(0.02)
        patience -= 1
        if not patience:  # who should tell is gone
            return
    inputs = draw(ROWS[number], "cuda", 0)
    for count in range(4):  # compiled, recorded and repeated by then
        if count == 3:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        ours.launch(WHICH, inputs)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=[""], help="only rows whose name contains one of these")
    parser.add_argument(
        "--warm", type=float, default=35, metavar="S", help="first compile in parallel, S s at most (35)"
    )
    parser.add_argument("--seconds", type=float, default=100, help="start no further row after this long (100)")
    parser.add_argument("--out", type=Path, default=RUNS / "counters", help="folder of the results")
    parser.add_argument("--call", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call is not None:
        call(arguments.call, arguments.told)
        return 0
    needs_gpu(parser)
    begin = time.monotonic()
    document: dict[str, Any] = {"machine": machine("cuda", copy_bandwidth("cuda")), "rows": []}
    torch.cuda.empty_cache()
    chosen = [number for number, case in enumerate(ROWS) if any(part in case.name for part in arguments.case)]
    print(warm([(Ours(), ROWS[number], WHICH, "cuda") for number in chosen], arguments.warm), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ahead = begun(chosen[0], folder)
        for number, following in zip(chosen, [*chosen[1:], None], strict=True):
            process, left = ahead, arguments.seconds - (time.monotonic() - begin)
            if following is not None and left > 0:
                ahead = begun(following, folder)
            found = ended(process, number, folder, min(max(left, 0) + LAST, LONGEST))
            told = {"case": ROWS[number].name, "which": WHICH}
            told |= {"note": found} if isinstance(found, str) else {"kernels": found}
            document["rows"].append(told)
            (arguments.out / "counters.json").write_text(json.dumps(document, indent=1) + "\n")
            print(f"{told['case']} ({time.monotonic() - begin:.0f} s)", flush=True)
            shown = [found] if isinstance(found, str) else [words(x) for x in found if (x["ns"] or 0) > 2e4]
            print("\n".join(f"  {line}" for line in shown), flush=True)
            if following is None or left <= 0:
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
