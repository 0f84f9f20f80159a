"""Is the operator on these ranks equal to one device, bit for bit, forward and backward?

    torchrun --nproc-per-node 4 -m leetdist.launch verify
    python -m leetdist.launch verify --virtual 8

Goes through a table of shapes, dtypes and decays, computes each on the ranks and on one device, and compares outputs,
states and gradients with torch.equal. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
import torch.distributed as dist

import leetdist
from leetdist.launch.runtime import Arguments, choose_device, joined
from leetdist.sequence.group import resolve
from leetdist.sequence.transport import Transport
from leetdist.testing.equality import Case, check, standard_cases


def main(argv: list[str]) -> int:
    parser = Arguments("leetdist.launch verify", __doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--virtual", type=int, default=0, help="use this many virtual ranks in one process instead")
    parser.add_argument("--long", type=int, help="add a case of this many tokens, 8 heads, 128 x 128, bf16")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    options = parser.parse_args(argv)
    if options.virtual:
        device = choose_device(options.device)
        results = leetdist.virtual_ranks(
            lambda group: run(group, device, options, print_lines=group.rank == 0), options.virtual
        )
        return int(any(results))
    with joined(options.device) as rank:
        transport = resolve(dist.group.WORLD)
        assert transport is not None
        return int(run(transport, rank.device, options, print_lines=rank.first))


def run(transport: Transport, device: torch.device, options: argparse.Namespace, *, print_lines: bool) -> bool:
    """All cases on one rank; True if anything differs on any rank."""
    show = partial(print, flush=True) if print_lines else lambda *_: None
    cases = standard_cases(device, long=options.long)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    show(f"{len(cases)} cases on {transport.size} ranks against one device: {name}, torch {torch.__version__}")
    failed = 0
    for number, case in enumerate(cases, 1):
        begin = time.perf_counter()
        problems = _everywhere(case, transport, device, options.seed + number)
        seconds = time.perf_counter() - begin
        verdict = "DIFFERS" if problems else "equal"
        show(f"[{number:2}/{len(cases)}] {verdict:<8}{seconds:6.1f} s  {case}")
        for problem in problems:
            show(f"        {problem}")
        failed += bool(problems)
    show(
        f"{failed} of {len(cases)} cases differ"
        if failed
        else f"all {len(cases)} cases equal, bit for bit: o, state, dq, dk, dv, dS_0, d log_decay"
    )
    return failed > 0


def _everywhere(case: Case, transport: Transport, device: torch.device, seed: int) -> list[str]:
    """What differs on any rank, in words."""
    mine = [str(difference) for difference in check(case, transport, device, seed)]
    return [line for lines in transport.gather_objects(mine, "what differs") for line in lines]
