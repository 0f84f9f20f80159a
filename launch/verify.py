"""`leetdist verify`: a table of calls on these ranks and on one device, compared with torch.equal."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import leetdist
from leetdist.launch import commands
from leetdist.launch.progress import Bar
from leetdist.launch.ranks import is_launched
from leetdist.launch.runtime import choose_device, joined, one_message
from leetdist.sequence.group import resolve
from leetdist.sequence.transport import Transport
from leetdist.testing.decoding import check_decoding, decoding_cases
from leetdist.testing.equality import Case, check, standard_cases

VIRTUAL = 4  # ranks, where nobody says how many


def main(argv: list[str]) -> int:
    options = commands.verify().parse_args(argv)
    if options.virtual or not is_launched():
        with one_message():
            device = choose_device(options.device)
            results = leetdist.virtual_ranks(
                lambda group: run(group, device, options, speaks=group.rank == 0), options.virtual or VIRTUAL
            )
        return int(any(results))
    with joined(options.device) as rank:
        transport = resolve(dist.group.WORLD)
        assert transport is not None
        return int(run(transport, rank.device, options, speaks=rank.first))


def run(transport: Transport, device: torch.device, options: argparse.Namespace, *, speaks: bool) -> bool:
    """All cases on one rank; True if anything differs on any rank."""
    cases = decoding_cases(device) if options.decode else standard_cases(device, long=options.long)
    found_by = check_decoding if options.decode else check
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    in_lines = speaks and not options.json
    if in_lines:
        other = "one call" if options.decode else "one device"
        print(f"{len(cases)} cases on {transport.size} ranks against {other}: {name}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    with Bar(len(cases), wanted=in_lines) as bar:
        for number, case in enumerate(cases, 1):
            bar.update(number - 1, str(case))
            begin = time.perf_counter()
            problems = _everywhere(found_by, case, transport, device, options.seed + number)
            seconds = time.perf_counter() - begin
            rows.append({"case": str(case), "equal": not problems, "seconds": seconds, "differences": problems})
            if in_lines:
                verdict = "DIFFERS" if problems else "equal"
                print(f"[{number:2}/{len(cases)}] {verdict:<8}{seconds:6.1f} s  {case}", flush=True)
                for problem in problems:
                    print(f"        {problem}", flush=True)
        bar.update(len(cases))
    failed = sum(not row["equal"] for row in rows)
    if in_lines:
        what = "prefill, decoding, drafts" if options.decode else "o, state, dq, dk, dv, dS_0, d log_decay"
        everything = f"all {len(cases)} cases equal, bit for bit: {what}"
        print(f"{failed} of {len(cases)} cases differ" if failed else everything)
    elif speaks:
        found = {"ranks": transport.size, "device": name, "torch": str(torch.__version__), "equal": not failed}
        print(json.dumps({**found, "cases": rows}, indent=2))
    return failed > 0


def _everywhere(
    found_by: Callable[..., Any], case: Case, transport: Transport, device: torch.device, seed: int
) -> list[str]:
    """What differs on any rank, in words."""
    mine = [str(difference) for difference in found_by(case, transport, device, seed)]
    return [line for lines in transport.gather_objects(mine, "what differs") for line in lines]
