"""How long two revisions keep the host with the same short calls, in turns.

Each revision is a process of its own that has made every call before. They compute batches of the same call one after
the other, here, base, here, base, so that whatever else the machine does slows both; what is compared is the processor
time of the calling thread, each revision's batch with the other's batch beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCH = 4e-3  # seconds


@dataclass(frozen=True)
class Short:
    """One short call. backward: forward and backward, of q, k and v; decay: False is none."""

    method: str
    tokens: int
    backward: bool = False
    heads: int = 2
    dim: int = 16
    decay: bool = True

    def __str__(self) -> str:
        plain, own = Short("", 0), vars(self)
        more = [f"{name}={value}" for name, value in own.items() if name not in ("method", "tokens", "backward")
                and value != getattr(plain, name)]  # fmt: skip
        return " ".join([self.method, f"N={self.tokens}", "fwd+bwd" if self.backward else "fwd", *more])


def short_calls() -> list[Short]:
    found = [Short(m, n, b) for m in ("block", "auto") for n in (16, 128, 1024) for b in (False, True)]
    others = ("lightning", "fleet", "causal_dot_product", "vanilla", "recursion")
    found += [Short(m, n, b) for m in others for n in (16, 128) for b in (False, True)]
    return [*found, Short("block", 16, heads=32), Short("block", 16, decay=False)]


def prepared(call: Short, device: str) -> Callable[[], Any]:
    import torch

    import leetdist

    shape = (1, call.heads, call.tokens, call.dim)
    q, k, v, do = (torch.randn(*shape, device=device) for _ in range(4))
    log_decay = -torch.linspace(0.01, 0.5, call.heads, device=device) if call.decay else None

    def forward() -> Any:
        return leetdist.linear_attention(q, k, v, log_decay, method=call.method)

    def both() -> None:
        for x in (q, k, v):
            x.grad = None
        forward().backward(do)

    if call.backward:
        for x in (q, k, v):
            x.requires_grad_()
    return both if call.backward else forward


def serve(device: str) -> None:
    """A revision's process: for each line (number of the call, how often) the seconds that took, a call."""
    import torch

    torch.set_num_threads(1)
    made: dict[int, Callable[[], Any]] = {}
    for line in sys.stdin:
        number, count = json.loads(line)
        if number not in made:
            made[number] = prepared(short_calls()[number], device)
        compute = made[number]
        begin = time.thread_time()
        for _ in range(count):
            compute()
        spent = time.thread_time() - begin
        check_own(Path.cwd().resolve())
        print(spent / count, flush=True)


def check_own(tree: Path) -> None:
    """An editable install of another revision fills in modules that this one lacks: RuntimeError."""
    strange = [
        name for name, module in sys.modules.items()
        if name.split(".")[0] == "leetdist" and not Path(module.__file__ or tree).resolve().is_relative_to(tree)
    ]  # fmt: skip
    if strange:
        raise RuntimeError(f"not of {tree}: {', '.join(strange)}")


class Revision:
    """The process of a checkout."""

    def __init__(self, script: Path, tree: Path, device: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--serve", "--device", device],
            env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def seconds(self, number: int, count: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([number, count]), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(script: Path, trees: dict[str, Path], device: str, turns: int, words: list[str]) -> list[dict[str, Any]]:
    """A row a call: microseconds of both (median and least), and the median of the ratios of neighbouring batches."""
    revisions = {where: Revision(script, tree, device) for where, tree in trees.items()}
    rows = []
    for number, call in enumerate(short_calls()):
        if words and not any(word in str(call) for word in words):
            continue
        for revision in revisions.values():
            revision.seconds(number, 20)
        count = max(1, round(BATCH / revisions["base"].seconds(number, 5)))
        spans: dict[str, list[float]] = {where: [] for where in trees}
        for _ in range(turns):
            for where, revision in revisions.items():
                spans[where].append(1e6 * revision.seconds(number, count))
        ratios = [here / base for here, base in zip(spans["here"], spans["base"], strict=True)]
        row = {
            "call": str(call), **asdict(call),
            **{f"{where}_us": round(statistics.median(x), 2) for where, x in spans.items()},
            **{f"{where}_least_us": round(min(x), 2) for where, x in spans.items()},
            "ratio": round(statistics.median(ratios), 4),
        }  # fmt: skip
        rows.append(row)
        print(f"{row['call']:44} here {row['here_us']:8} base {row['base_us']:8} us, least {row['here_least_us']:8} "
              f"{row['base_least_us']:8}, ratio {row['ratio']}", flush=True)  # fmt: skip
    for revision in revisions.values():
        revision.close()
    return rows
