"""python benchmarks/run.py [SUITE ...]: leetdist beside its peers; without a suite, what there is to run.

Every contestant's result is compared with fp64 first, on fresh inputs and poisoned memory; no time is shown for a wrong
one. Then they take turns. The floor is the bytes that must move over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.cases import SUITES as PLAIN
from common.cases import Case
from common.contestants import Contestant
from common.everyone import contestants
from common.measure import Result, copy_bandwidth, run_case
from common.place import RUNS
from common.report import machine, save, table
from common.spread import joined, spread, take
from common.warm import warm
from suites import gated
from suites import map as situations

SUITES = {**PLAIN, "gated": gated.SUITE, "map": situations.SUITE}


def listing() -> str:
    lines = ["suites (python benchmarks/run.py SUITE ...):"]
    for name, (about, cases) in SUITES.items():
        lines += [f"\n  {name}: {about}"]
        lines += [f"    {case.name}  [{', '.join(case.passes)}]" for case in cases]
    here, missing = contestants(None)
    lines += ["\ncontestants: " + ", ".join(f"{c.name} ({'/'.join(c.devices)})" for c in here)]
    lines += [f"left out: {name}, {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="what to run; none lists them")
    parser.add_argument("--base", metavar="REV", help="an earlier commit to compare with")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--only", default="", help="only contestants whose name contains this")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="[SUITE:]NAME[/PASS]",
        help="leave out a contestant, or one of its passes, or in one suite; may be repeated",
    )
    parser.add_argument("--warm", type=float, metavar="S", help="first compile and tune in parallel, S seconds at most")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="spread the passes over N GPUs, the last first"
    )
    parser.add_argument("--taking", type=Path, help=argparse.SUPPRESS)  # a process of such a run, and where they meet
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds a contestant (20)")
    parser.add_argument("--seconds", type=float, help="start no further case after this long")
    parser.add_argument("--out", type=Path, help="folder of the results (runs/benchmarks/SUITE)")
    parser.add_argument("--name", help="name of the result files, of one suite (its name)")
    arguments = parser.parse_args()
    if arguments.name and len(arguments.suites) > 1:
        parser.error("--name is for one suite")
    for suite in arguments.suites:
        if suite not in SUITES:
            parser.error(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    return arguments


class Pass(NamedTuple):
    """A line of the run: one case, one pass, those who compete."""

    suite: str
    case: Case
    which: str
    device: str
    chosen: list[Contestant]


def passes(arguments: argparse.Namespace, here: list[Contestant]) -> list[Pass]:
    left_out = set(arguments.without)
    todo = []
    for suite in arguments.suites:
        device = "cpu" if suite == "cpu" else "cuda"
        for case in SUITES[suite][1]:
            for which in case.passes if arguments.case in case.name else ():
                chosen = [
                    c
                    for c in here
                    if c.serves(case, which, device)
                    and arguments.only in c.name
                    and left_out.isdisjoint(a + b for a in ("", f"{suite}:") for b in (c.name, f"{c.name}/{which}"))
                ]
                todo.append(Pass(suite, case, which, device, chosen))
    return todo


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


def main() -> int:
    arguments = parse()
    if not arguments.suites:
        print(listing())
        return 0
    begin = time.monotonic()
    here, missing = contestants(arguments.base)
    for who, reason in missing.items() if not arguments.taking else ():
        print(f"left out: {who}, {reason}")
    results: list[Result] = []
    facts: dict[str, object] = {}
    todo = passes(arguments, here)
    if any(p.device == "cuda" for p in todo) and not torch.cuda.is_available():
        print("a CUDA device is needed; by all suites but cpu")
        return 1
    if arguments.warm:
        print(warm([(c, p.case, p.which, p.device) for p in todo for c in p.chosen], arguments.warm), flush=True)
    if arguments.gpus > 1:
        return over_gpus(arguments, todo, time.monotonic() - begin)
    numbered = list(enumerate(todo, 1))
    # Spread, the last first: slow passes are there, and with short ones at the end all are done at about the same time.
    for number, (suite, case, which, device, chosen) in numbered[::-1] if arguments.taking else numbered:
        if arguments.seconds and time.monotonic() - begin > arguments.seconds:
            if not arguments.taking:
                print(f"stopped after {arguments.seconds:.0f} s, {len(todo) - number + 1} passes left out")
            break
        if arguments.taking and not take(arguments.taking, number):
            continue
        if not facts:
            gc.collect()
            gc.freeze()  # what is loaded is not looked through again after every contestant
            facts = machine(device, copy_bandwidth(device))
            print(json.dumps(facts), flush=True)
        prefix = f"[{number}/{len(todo)}] {case.name}, {which}: "
        say(prefix)
        measured = run_case(
            suite, case, which, chosen, device, facts["copy_bytes_per_second"], arguments.rounds,
            lambda text, prefix=prefix: say(prefix + text),
        )  # fmt: skip
        for result in measured:
            result.details["length"] = suite in ("lengths", "cpu") and case.batch == 1 and not case.graph
            result.details["situation"] = suite == "map"
        results += measured
        say("")
        print(table(measured) + "\n", flush=True)
        keep(results, facts, arguments, suite, plots=False)  # in case the rest is cut short
    if arguments.taking:
        return 0
    if results:
        print(table(results))
    for suite in dict.fromkeys(result.suite for result in results):
        for path in keep(results, facts, arguments, suite, plots=True):
            print(f"wrote {path}")
    return 0


def over_gpus(arguments: argparse.Namespace, todo: list[Pass], spent: float) -> int:
    """The same run in a process a GPU."""
    options = ["--gpus", "1", "--warm", "0"]
    if arguments.seconds:
        options += ["--seconds", str(max(1.0, arguments.seconds - spent))]
    order = [(p.suite, p.case.name, p.which) for p in todo]
    place = (arguments.out or RUNS / arguments.suites[0]) / "parts"
    failed = spread(arguments.gpus, place, options)
    missing = set(order)
    for suite in arguments.suites:
        results, facts = joined(place, arguments.name or suite, order)
        missing -= {(result.suite, result.case, result.which) for result in results}
        if results:
            facts["command"] = shlex.join(["python", *sys.argv])
            print(table(results))
            for path in keep(results, facts, arguments, suite, plots=True):
                print(f"wrote {path}")
    print(f"{len(missing)} of {len(order)} passes left out" + f"; {failed} processes failed" * bool(failed))
    if not failed:
        shutil.rmtree(place)
    return min(failed, 1)


def keep(
    results: list[Result], facts: dict[str, object], arguments: argparse.Namespace, suite: str, *, plots: bool
) -> list[Path]:
    """The files of one suite."""
    own = [result for result in results if result.suite == suite]
    return save(own, facts, arguments.out or RUNS / suite, arguments.name or suite, plots=plots)


if __name__ == "__main__":
    sys.exit(main())
