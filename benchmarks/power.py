"""python benchmarks/power.py: clock and power while a call runs over and over, as in training.

A GPU that draws what it may lowers its clock, and a kernel that waits less is then no faster: what counts is what a
call costs in energy. Rows are calls of the map and of `run.py gated`, with an idle and a copying GPU beside them.
`nvidia-smi`, which must be on the PATH, is asked every 50 ms, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.contestants import Ours
from common.events import milliseconds
from common.measure import call_of, copy_bandwidth, draw
from common.place import RUNS, needs_gpu
from common.report import machine
from suites.gated import MAMBA
from suites.map import PLAIN, heads_of

CASES = [
    PLAIN,
    replace(PLAIN, kv_heads=8),
    replace(PLAIN, learnt=True),
    replace(PLAIN, decay="token"),
    MAMBA,
    heads_of(256, heads=16),
    heads_of(256, heads=16, dtype="fp32"),
]
COLUMNS = "clocks.sm,power.draw,clocks_event_reasons.active"
POWER_CAP = 0x4  # nvmlClocksEventReasonSwPowerCap: the clock is lowered to keep within the power limit
SETTLE = 1.0  # seconds of rest before a row, and of work that are not counted


@dataclass
class Sample:
    mhz: float
    watts: float
    capped: bool


def sample(line: str) -> Sample | None:
    """Of a line of COLUMNS without units; None where a number is missing, as on GPUs that do not tell."""
    try:
        mhz, watts, reasons = (part.strip() for part in line.split(","))
        return Sample(float(mhz), float(watts), bool(int(reasons, 16) & POWER_CAP))
    except ValueError:
        return None


def summary(samples: list[Sample]) -> dict[str, float]:
    """Medians, and the share of samples at which power held the clock down."""
    return {
        "mhz": statistics.median(x.mhz for x in samples),
        "watts": statistics.median(x.watts for x in samples),
        "capped": statistics.mean(x.capped for x in samples),
    }


def watched(work: Callable[[], object], seconds: float) -> list[Sample]:
    """What nvidia-smi says while `work` is called again and again."""
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", "-i", gpu, f"--query-gpu={COLUMNS}", "--format=csv,noheader,nounits", "-lms", "50"]
    begin = time.monotonic()
    while time.monotonic() - begin < SETTLE:
        work()
    with tempfile.TemporaryFile("w+") as told:
        with subprocess.Popen(command, stdout=told, stderr=told) as asked:
            try:
                while time.monotonic() - begin < SETTLE + seconds:
                    work()
            finally:
                asked.terminate()
        told.seek(0)
        said = told.read()
    found = [x for x in map(sample, said.splitlines()) if x is not None]
    if len(found) < 3:
        raise RuntimeError(f"nvidia-smi gave {len(found)} samples of {COLUMNS} in {seconds} s; it said: {said[:200]!r}")
    return found


def row(name: str, which: str, call: Callable[[], object] | None, seconds: float) -> dict[str, Any]:
    """A call's time in the first calls after rest and under load, and what it draws; joules a call."""
    told: dict[str, Any] = {"case": name, "which": which}
    time.sleep(SETTLE)
    if call is None:
        return told | summary(watched(lambda: time.sleep(0.05), seconds))
    rested, loaded = milliseconds(call, 5, warm=2), []
    told |= summary(watched(lambda: loaded.extend(milliseconds(call, 4, warm=0)), seconds))
    ms = statistics.median(loaded)
    return told | {"rested_ms": statistics.median(rested), "ms": ms, "joules": told["watts"] * ms * 1e-3}


def copying() -> Callable[[], object]:
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def words(told: dict[str, Any]) -> str:
    line = f"{told['case']:46} {told['which']:19} {told['mhz']:5.0f} MHz {told['watts']:4.0f} W"
    line += f", held by power {100 * told['capped']:3.0f} %"
    if "ms" in told:
        line += f"; {told['rested_ms']:7.3f} ms rested, {told['ms']:7.3f} under load, {told['joules']:.2f} J"
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=[""], help="only rows whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a row (2)")
    parser.add_argument("--out", type=Path, default=RUNS / "power", help="folder of the results")
    arguments = parser.parse_args()
    if arguments.seconds < 0.5:
        parser.error(f"--seconds {arguments.seconds:g}: nvidia-smi is asked every 50 ms, so at least 0.5")
    needs_gpu(parser)
    if shutil.which("nvidia-smi") is None:
        parser.exit(1, f"{parser.prog}: nvidia-smi, which says clocks and power, is not on the PATH\n")
    document: dict[str, Any] = {"machine": machine("cuda", copy_bandwidth("cuda")), "rows": []}
    arguments.out.mkdir(parents=True, exist_ok=True)

    def done(told: dict[str, Any]) -> None:
        document["rows"].append(told)
        (arguments.out / "power.json").write_text(json.dumps(document, indent=1) + "\n")
        print(words(told), flush=True)

    done(row("nothing", "", None, arguments.seconds))
    done(row("a copy of 1 GiB", "", copying(), arguments.seconds))
    for case in CASES:
        if not any(part in case.name for part in arguments.case):
            continue
        inputs = draw(case, "cuda", 0)
        for which in case.passes:
            done(row(case.name, which, call_of(Ours(), which, inputs), arguments.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
