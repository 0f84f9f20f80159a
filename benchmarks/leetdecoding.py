"""LeetDecoding's tables on this machine: every method of leetdist, and LeetDecoding's own kernels beside them.

    python benchmarks/leetdecoding.py --leetdecoding path/to/leetDecoding-0.0.3 --out benchmarks/results
    python benchmarks/leetdecoding.py --training --batches 1 --lengths 2048 8192
    python benchmarks/leetdecoding.py --show benchmarks/results/leetdecoding*.json --out benchmarks/results
    python benchmarks/leetdecoding.py --fit benchmarks/results/leetdecoding/leetdecoding.json    # writes costs.json

Latency (medians of calls in a row: the larger of what the host and the device take; and of the device alone, where
that differs) and peak memory beyond the inputs, for 32 heads, rank 128, dimension 128, with decay.
Each cell is checked against the fp64 definition on a few rows before it is timed, its memory poisoned with NaN; "OOM"
is what it says, "wrong" is a relative error beyond the dtype's bound. Writes <name>.json and <name>.png to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() without touching the GPU
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.place import needs_gpu
from common.quiet import no_collection
from suites.leetdecoding.contestants import THEIRS, Attention, ours, theirs
from suites.leetdecoding.report import DIM, Cell, about, auto_against_best, console, figure, fit, tables

from leetdist.reference import quadratic, relative_error

Shape = tuple[str, int, int]  # dtype, batch, tokens
LENGTHS = [128, 512, 2_048, 8_192, 12_800, 25_600, 100_000]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative error of the whole output: fp32 arithmetic, and the rounding of a 16-bit output with some room.
BOUNDS = {"fp32": 1e-5, "fp16": 1.5e-3, "bf16": 1e-2}
TURNS, MILLISECONDS_A_TURN = 5, 3.0
SHORT_TURNS, SHORT = 24, 1.0  # for calls of at most so many milliseconds
CALLS_AN_EVENT = 5  # or recording events would be a part of short calls that shows
CYCLES = 2e6  # of a GPU in a millisecond, about
# Before it is timed, so long a contestant runs alone: after a neighbour that heats the chip, one and the same call took
# up to a fifth longer.
SETTLE = 8.0


class Inputs:
    """What all contestants of a cell get, and a few rows of what they must return."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(cell.tokens)
        shape, dtype = (cell.batch, cell.heads, cell.tokens, DIM), DTYPES[cell.dtype]
        q, k, v = (
            torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_(cell.training)
            for _ in range(3)
        )
        self.qkv = (q, k, v)
        self.log_decay = -torch.logspace(-3, -0.1, cell.heads, device=device)
        self.weight = torch.randn_like(v) if cell.training else None
        rows = torch.randint(cell.tokens, (4,), device=device, generator=generator)
        self.rows = torch.unique(torch.cat((rows, rows.new_tensor([0, cell.tokens - 1]))))
        # Of the last batch entry, the slowest and the fastest decay.
        self.exact = []
        for part in (slice(0, 1), slice(cell.heads - 1, cell.heads)):
            with torch.no_grad():
                some = (x[-1:, part] for x in self.qkv)
                self.exact.append((part, quadratic(*some, self.log_decay[part], rows=self.rows)))

    def error(self, o: Tensor) -> float:
        return max(relative_error(o[-1:, part, self.rows], exact) for part, exact in self.exact)


def check(cell: Cell, call: Attention, inputs: Inputs, device: torch.device) -> Callable[[], Any]:
    """Correct first: fills in the error and the memory, and returns what is to be timed."""

    def step() -> Tensor:
        o = call(*inputs.qkv, inputs.log_decay)
        if inputs.weight is not None:
            torch.autograd.grad(o, inputs.qkv, inputs.weight)
        return o

    poison = torch.full_like(inputs.qkv[2], float("nan"), requires_grad=False)
    del poison
    for number in range(3):  # the first compiles; of the others the faster counts: one stalled for seconds, once
        _synchronize(device)
        before = _memory(device, reset=True)
        started = time.perf_counter()
        o = step()
        _synchronize(device)
        took = (time.perf_counter() - started) * 1e3
        cell.milliseconds = min(took, cell.milliseconds or took) if number > 1 else took
        cell.mebibytes = (_memory(device) - before) / 2**20
        if number == 0:
            cell.error = inputs.error(o.detach())
        del o
        if took > 1e4:
            break
    assert cell.error is not None
    if not cell.error <= BOUNDS[cell.dtype]:
        cell.note = f"wrong ({cell.error:.1e})"
    return step


def time_in_turns(steps: list[tuple[Cell, Callable[[], Any]]], device: torch.device) -> None:
    """Replace the first times by medians. Contestants take turns, in another order each time, so that a change in
    clocks, or in what else the host does, meets all of them. Short calls take more turns: their time is the host's,
    which is restless, so the device's is taken too."""
    times: dict[int, list[float]] = {i: [] for i in range(len(steps))}
    device_times: dict[int, list[float]] = {i: [] for i in range(len(steps))}
    order = random.Random(0)
    with no_collection():
        for turn in range(SHORT_TURNS):
            for i, (cell, step) in order.sample(list(enumerate(steps)), len(steps)):
                once = cell.milliseconds or 1.0
                if turn >= TURNS and once > SHORT:
                    continue
                for _ in range(min(40, int(SETTLE / once))):
                    step()
                repeats = max(1, min(20, int(MILLISECONDS_A_TURN / once)))
                times[i].append(statistics.median(_times(step, repeats, device)))
                if once <= SHORT and device.type == "cuda":
                    busy = 2 * once * repeats
                    device_times[i].append(statistics.median(_times(step, repeats, device, busy)))
    for i, (cell, _) in enumerate(steps):
        cell.milliseconds = cell.device_milliseconds = statistics.median(times[i])
        if device_times[i]:
            cell.device_milliseconds = statistics.median(device_times[i])


def _times(step: Callable[[], Any], repeats: int, device: torch.device, busy: float = 0.0) -> Iterator[float]:
    """Milliseconds of a repetition; on a GPU between events, so that the host may run ahead. busy: so long the GPU
    has other work first, and then all the calls before it.

    On a CPU they are the process's own, so that other programs do not count: set OMP_NUM_THREADS=1.
    """
    if device.type == "cpu":
        for _ in range(repeats):
            started = time.process_time()
            step()
            yield (time.process_time() - started) * 1e3
        return
    each = CALLS_AN_EVENT if repeats >= 2 * CALLS_AN_EVENT else 1
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats // each + 1)]
    if busy:
        torch.cuda._sleep(int(busy * CYCLES))
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(each):
            step()
        mark.record()
    torch.cuda.synchronize()
    yield from (a.elapsed_time(b) / each for a, b in pairwise(marks))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device, reset: bool = False) -> int:
    if device.type == "cpu":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    return list(itertools.product(arguments.dtypes, arguments.batches, sorted(arguments.lengths)))


def run(arguments: argparse.Namespace) -> Iterator[list[Cell]]:
    """The cells of one shape after the other: leetdist's, then LeetDecoding's, each of its kernels in a process of its
    own, because an address that is wrong ends more than the kernel."""
    for names in _groups(arguments):
        shapes = shapes_of(arguments)
        while shapes:
            done = 0
            for cells in _in_a_process(arguments, names, shapes):
                yield cells
                done += 1
            if done < len(shapes) and not (done and _ended_the_process(cells)):
                what = (*shapes[done], arguments.training, arguments.heads)
                yield [Cell(name, *what, note="ends the process") for name in names]
                done += 1
            shapes = shapes[done:]


def _groups(arguments: argparse.Namespace) -> list[list[str]]:
    """Contestants that share a process."""
    mine = [name for name in ours() if _wanted(name, arguments)]
    others = [] if arguments.training or not arguments.leetdecoding else list(THEIRS)
    return [group for group in (mine, *([name] for name in others if _wanted(name, arguments))) if group]


def _wanted(name: str, arguments: argparse.Namespace) -> bool:
    return not arguments.only or any(part in name for part in arguments.only)


def _ended_the_process(cells: list[Cell]) -> bool:
    return any("AcceleratorError" in cell.note for cell in cells)


def _in_a_process(arguments: argparse.Namespace, names: list[str], shapes: list[Shape]) -> Iterator[list[Cell]]:
    """As many shapes' cells as the process lives for. It is forked, so this one may not touch the GPU."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def child() -> None:
        here.close()
        for cells in measure(arguments, names, shapes):
            there.send(cells)

    process = fork.Process(target=child)
    process.start()
    there.close()
    with contextlib.suppress(EOFError):
        while True:
            yield here.recv()
    process.join()


def measure(arguments: argparse.Namespace, names: list[str], shapes: list[Shape]) -> Iterator[list[Cell]]:
    """The cells of one shape after the other, until an error after which nothing more can run in this process."""
    device = torch.device(arguments.device)
    every = {**ours(), **theirs(arguments.leetdecoding, names)}
    contestants = {name: every[name] for name in names if name in every}
    slow: set[tuple[str, str, int]] = set()  # contestant, dtype, batch: a shorter cell took far too long
    for shape in shapes:
        cells = [Cell(name, *shape, arguments.training, arguments.heads) for name in contestants]
        with torch.set_grad_enabled(arguments.training):
            _one_shape(cells, contestants, slow, device, arguments.limit)
        if device.type == "cuda" and not _ended_the_process(cells):
            torch.cuda.empty_cache()
        yield cells
        if _ended_the_process(cells):
            return


def _one_shape(
    cells: list[Cell],
    contestants: dict[str, Attention],
    slow: set[tuple[str, str, int]],
    device: torch.device,
    limit: float,
) -> None:
    inputs: Inputs | None = None
    steps: list[tuple[Cell, Callable[[], Any]]] = []
    for cell in cells:
        key = (cell.contestant, cell.dtype, cell.batch)
        if key in slow:
            cell.note = "too long"
            continue
        try:
            inputs = inputs or Inputs(cell, device)
            step = check(cell, contestants[cell.contestant], inputs, device)
            if (cell.milliseconds or 0.0) <= 1e3 * limit:
                steps.append((cell, step))
            elif (cell.milliseconds or 0.0) > 1e4 * limit:
                slow.add(key)
        except torch.OutOfMemoryError:
            cell.note = "OOM"
        except Exception as error:
            cell.note = f"fails: {type(error).__name__}"
            print(cell, str(error)[:300], file=sys.stderr)
        if _ended_the_process([cell]):
            return
        if device.type == "cuda" and cell.note:
            torch.cuda.empty_cache()
    time_in_turns(steps, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "fp16"], choices=list(DTYPES))
    parser.add_argument("--device", help="cuda, or cpu (cuda)")
    parser.add_argument("--training", action="store_true", help="forward and backward, leetdist only")
    parser.add_argument("--leetdecoding", help="folder that holds LeetDecoding's package")
    parser.add_argument("--only", nargs="+", help="contestants whose names contain one of these")
    parser.add_argument(
        "--limit",
        type=float,
        default=1.0,
        help="seconds: longer cells are timed once, none after one of ten times as long",
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--name", default="leetdecoding", help="of the files there")
    parser.add_argument("--show", type=Path, nargs="+", help="print and draw these results, and measure nothing")
    parser.add_argument("--fit", type=Path, nargs="+", help="fit the cost model to these results, and stop")
    arguments = parser.parse_args()
    if arguments.fit:
        fit(arguments.fit)
        return
    if arguments.device is None and not arguments.show:
        needs_gpu(parser, "--device cpu --lengths 128 512 runs on a CPU")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cells, began = [], about(arguments.device)
    if arguments.show:
        shown = [json.loads(path.read_text()) for path in arguments.show]
        cells = [Cell(**c) for content in shown for c in content["cells"]]
    else:
        from rich.progress import track

        for more in track(
            run(arguments),
            "measuring",
            total=len(_groups(arguments)) * len(shapes_of(arguments)),
            console=console(stderr=True),
        ):
            cells += more
            if arguments.out:  # after every shape: what is cut off keeps what it has
                arguments.out.mkdir(parents=True, exist_ok=True)
                content = {**began, "auto": auto_against_best(cells), "cells": [asdict(c) for c in cells]}
                (arguments.out / f"{arguments.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    tables(cells)
    for kind, found in auto_against_best(cells).items():
        print(kind, {key: value for key, value in found.items() if key != "ratios"})
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        figure(cells, arguments.out / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
