"""Compile and tune, in parallel processes, what is going to be measured: done one after the other in the run itself, it
takes minutes (fla's chunk backward alone 90 s), and a run on a lent machine has few.

Kernels, and what fla's autotuner chose (it writes that down), are found again in Triton's cache by the run that
follows. The choice is made while others use the GPU too, so it may not be the best: without --warm, each tunes alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import Case
from contestants import Contestant, contestants
from measure import call_of, draw

SHORT = 4096  # tokens: no kernel is compiled for a length


def warm(todo: Iterable[tuple[Contestant, Case, str, str]], seconds: float) -> str:
    """Each contestant once on short inputs of each kind; what became of it, in words."""
    begin = time.monotonic()
    kinds = {
        json.dumps([c.name, asdict(replace(case, batch=1, tokens=min(case.tokens, SHORT), graph=False)), which, device])
        for c, case, which, device in todo
    }

    def run(kind: str) -> bool:
        left = seconds - (time.monotonic() - begin)
        if left <= 0:
            return False
        try:
            done = subprocess.run([sys.executable, __file__, kind], timeout=left, capture_output=True)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    # Those that differentiate take longest.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        good = sum(pool.map(run, sorted(kinds, key=lambda kind: "backward" not in kind)))
    return f"{good} of {len(kinds)} kinds of calls warmed up in {time.monotonic() - begin:.0f} s"


def main() -> None:
    name, case, which, device = json.loads(sys.argv[1])
    chosen = next(c for c in contestants(None)[0] if c.name == name)
    inputs = draw(Case(**case | {"passes": tuple(case["passes"])}), device, 0)
    call_of(chosen, which, inputs)()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
