"""Compile and tune, in parallel processes, what is going to be measured: done one after the other in the run itself, it
takes minutes (fla's chunk backward alone 90 s).

Kernels, and what fla's autotuner chose (it writes that down), are found again in Triton's cache by the run that
follows. The choice is made while others use the GPU too, so it may not be the best: without --warm, each tunes alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # leetdist
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks

import torch
from common.cases import Case
from common.contestants import Contestant
from common.everyone import everyone
from common.measure import call_of, draw

# Tokens. No peer compiles a kernel for a length; ours has others where a GPU has more multiprocessors than tiles.
SHORT, ENOUGH = 2048, 16384


def warm(todo: Iterable[tuple[Contestant, Case, str, str]], seconds: float) -> str:
    """Each contestant once on short inputs of each kind; what became of it, in words."""
    begin = time.monotonic()
    kinds = {
        (c.name, short(case, case.tokens if c.by_length else ENOUGH if c.ours else SHORT), which, device)
        for c, case, which, device in todo
        if c.compiles
    }
    both = {kind for kind in kinds if "backward" in kind[2]}  # they take longest, and go forward too
    rest = {kind for kind in kinds - both if (*kind[:2], "forward + backward", kind[3]) not in both}

    def run(kind: tuple[str, Case, str, str]) -> bool:
        left = seconds - (time.monotonic() - begin)
        if left <= 0:
            return False
        try:
            described = json.dumps([kind[0], asdict(kind[1]), *kind[2:]])
            done = subprocess.run([sys.executable, __file__, described], timeout=left, capture_output=True)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Peers first: what is tuned takes longest.
        good = sum(pool.map(run, [*sorted(both, key=lambda kind: (kind[0].startswith("leetdist"), kind[0])), *rest]))
    return f"{good} of {len(both) + len(rest)} kinds of calls warmed up in {time.monotonic() - begin:.0f} s"


def short(case: Case, tokens: int) -> Case:
    return replace(case, batch=case.batch if tokens == case.tokens else 1, tokens=min(case.tokens, tokens), graph=False)


def tune_in_parallel() -> None:
    """Triton's autotuner compiles the configurations that it is going to compare side by side, not one after the other:
    mamba_ssm's backward has 200."""
    from triton.runtime import autotuner
    from triton.runtime._async_compile import AsyncCompileMode

    prune = autotuner.Autotuner.prune_configs

    def compiled(self: Any, given: dict[str, Any]) -> Any:
        configs = prune(self, given)
        more = {name: x for name, x in given.items() if name != "warmup"}
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **more, **config.all_kwargs())
        return configs

    autotuner.Autotuner.prune_configs = compiled


def main() -> None:
    name, case, which, device = json.loads(sys.argv[1])
    chosen = next(c for c in everyone(None) if c.name == name)
    options = tuple(map(tuple, case["options"]))
    inputs = draw(Case(**case | {"passes": tuple(case["passes"]), "options": options}), device, 0)
    if device == "cuda" and not chosen.ours:
        with contextlib.suppress(ImportError):
            tune_in_parallel()
    call_of(chosen, which, inputs)()
    chosen.wait()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
