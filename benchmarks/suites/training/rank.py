"""One rank of benchmarks/training.py: trainings one after the other in one process, so that a job starts once, and a
layer of the model by itself. The first rank prints a row of each, as JSON behind ROW.

What is not an option of this script is one of launch/train.py, which trains.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from suites.training.options import ROW, WAYS, parser
from suites.training.spans import summary

import leetdist
from leetdist.launch import train
from leetdist.launch.model import Config
from leetdist.nn import LightningAttention
from leetdist.reference import relative_error

IN_A_ROW = 20


class Traced(train.Progress):
    """Progress that has the last step traced, from the end of the step before it; the tracer warms up in that."""

    profiler: ClassVar[torch.profiler.profile]

    def advance(self, *given: Any) -> None:
        super().advance(*given)
        if self.step == self.options.steps - 2:
            activities = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else None
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
            Traced.profiler = torch.profiler.profile(activities=activities, schedule=schedule)
            Traced.profiler.start()
        elif self.step == self.options.steps - 1:
            Traced.profiler.step()
            dist.all_reduce(torch.zeros(1))  # over gloo: no rank is late for having begun to trace
        elif self.step == self.options.steps:
            Traced.profiler.stop()


def training(tokens: int, way: str, options: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Median tokens/s of the steps after --skip, most memory, losses, and what the traced step was spent on."""
    begin, steps = time.monotonic(), options.steps
    with tempfile.TemporaryDirectory() as folder:
        if options.profile:
            train.Progress, steps = Traced, steps + 2  # type: ignore[misc]
        train.main([
            "--tokens", str(tokens), "--steps", str(steps), "--model", options.model, "--save-every", "-1",
            "--out", folder, *(["--compile"] if way == "compiled" else []), *more,
        ])  # fmt: skip
        if dist.get_rank():
            return {}
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        row = {
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows[options.skip : options.steps]),
            "memory_gib": max(row["memory_gib"] for row in rows),
            "first_loss": rows[0]["loss"], "loss": rows[-1]["loss"], "seconds": round(time.monotonic() - begin, 1),
        }  # fmt: skip
        if options.profile:
            Traced.profiler.export_chrome_trace(f"{folder}/trace.json")
            row["traced"] = summary(json.loads(Path(folder, "trace.json").read_text())["traceEvents"])
    return row


def layer(tokens: int, way: str, options: argparse.Namespace, mesh: Any) -> dict[str, Any]:
    """The model's attention alone, `tokens` a rank, calls in a row: ms of the slowest rank, medians."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    config = Config.preset(options.model)
    torch.manual_seed(0)
    one = LightningAttention(config.dim, config.heads, decay=config.decay, layers=config.layers, group=mesh["sp"])
    one = one.to(device, torch.bfloat16 if cuda else torch.float32)
    x, dy = (torch.randn(1, tokens, config.dim, device=device, dtype=one.out_proj.weight.dtype) for _ in range(2))
    run = torch.compile(one, dynamic=False, fullgraph=True) if way == "compiled" else one

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run(x)

    def both() -> Any:
        return torch.autograd.grad(run(x), list(one.parameters()), dy)

    with torch.no_grad():
        error = relative_error(run(x), one(x))
    if not error < 2e-2:
        return {"error": f"{way} differs from eager by {error}"}
    row: dict[str, Any] = {"relative_error": error}
    for name, call in (("forward", forward), ("forward + backward", both)):
        spans = []
        for repeat in range(options.repeat + 2):
            dist.all_reduce(torch.zeros(1, device=device))
            begin = _now(cuda)
            for _ in range(IN_A_ROW):
                call()
            if repeat >= 2:  # the first ones compile, and record launches
                spans.append((_now(cuda) - begin) / IN_A_ROW * 1e3)
        slowest = torch.tensor(spans, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        row[f"{name} ms"] = round(statistics.median(slowest.tolist()), 4)
    return row


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    options, more = parser().parse_known_args()
    begin, mesh = time.monotonic(), leetdist.device_mesh()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainings = [("training", tokens, way) for way in WAYS for tokens in options.tokens if way in options.ways]
    layers = [("layer", tokens, way) for tokens in options.layer for way in WAYS if way in options.ways]
    for what, tokens, way in trainings + layers:
        if train.out_of_time(begin, options.limit, device):
            row: dict[str, Any] = {"error": f"not begun after {options.limit:g} s"}
        else:
            torch._dynamo.reset()  # a graph for each length, not one for all
            row = layer(tokens, way, options, mesh) if what == "layer" else training(tokens, way, options, more)
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if dist.get_rank() == 0:
            print(ROW + json.dumps({"what": what, "tokens": tokens, "way": way, **row}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
