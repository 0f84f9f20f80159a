"""LeetDecoding's tables on this machine: every method of leetdist, and LeetDecoding's own kernels beside them.

    python benchmarks/leetdecoding.py --leetdecoding path/to/leetDecoding-0.0.3 --out benchmarks/results
    python benchmarks/leetdecoding.py --training --batches 1 --lengths 2048 8192
    python benchmarks/leetdecoding.py --show benchmarks/results/leetdecoding*.json --out benchmarks/results
    python benchmarks/leetdecoding.py --fit benchmarks/results/leetdecoding.json    # writes leetdist/methods/costs.json

Latency (median; device events) and peak memory beyond the inputs, for 32 heads, rank 128, dimension 128, with decay.
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
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() without touching the GPU
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import leetdist
from leetdist.methods import cost
from leetdist.problem import METHODS
from leetdist.reference import quadratic, relative_error
from leetdist.sequence.grid import default_tile

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Shape = tuple[str, int, int]  # dtype, batch, tokens
DIM = 128
LENGTHS = [128, 512, 2_048, 8_192, 12_800, 25_600, 100_000]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative error of the whole output: fp32 arithmetic, and the rounding of a 16-bit output with some room.
BOUNDS = {"fp32": 1e-5, "fp16": 1.5e-3, "bf16": 1e-2}
TURNS, MILLISECONDS_A_TURN = 5, 3.0
SHORT_TURNS, SHORT = 24, 1.0  # for calls of at most so many milliseconds


@dataclass
class Cell:
    contestant: str
    dtype: str
    batch: int
    tokens: int
    training: bool
    heads: int
    milliseconds: float | None = None
    mebibytes: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def text(self) -> str:
        time = "" if self.milliseconds is None else f"{self.milliseconds:.3g}"
        return f"{time} {self.note}".strip()


def ours() -> dict[str, Attention]:
    call = leetdist.linear_attention
    return {f"leetdist {method}": partial(_named, call, method) for method in METHODS}


def _named(call: Any, method: str, *tensors: Tensor) -> Tensor:
    return call(*tensors, method=method)


def _factor(log_decay: Tensor) -> Tensor:
    return torch.exp(log_decay)


def _slope(log_decay: Tensor) -> Tensor:
    return -log_decay


# Module, function, and the form in which it takes the decay.
THEIRS = {
    "LeetDecoding FleetAttention": ("FleetAttention_triton", "FleetAttention_triton", _factor),
    "LeetDecoding causal_dot_product": ("causal_dot_product", "causal_dot_product", _factor),
    "LeetDecoding lightningAttention2": ("lightningAttention2", "lightning_attn2", _slope),
    "LeetDecoding block-based": ("BlockBased", "blockBased", _slope),
    "LeetDecoding recursion": ("Recursion", "recursion", _slope),
    "LeetDecoding vanilla": ("linear_attn", "linear_attn", _slope),
}


def theirs(folder: str | None, only: list[str]) -> dict[str, Attention]:
    """LeetDecoding's kernels that can be imported here, each given the decay in the form it takes."""
    if folder is None:
        return {}
    sys.path.insert(0, folder)
    # Their Lightning kernel looks the GPU's name up in a table of four at import, through pycuda; it is told A100.
    driver = type(sys)("pycuda.driver")
    driver.Device = lambda index: type("Device", (), {"name": lambda self: "NVIDIA A100 80GB PCIe"})()
    package = type(sys)("pycuda")
    package.driver, package.autoinit = driver, None
    sys.modules.update({"pycuda": package, "pycuda.driver": driver, "pycuda.autoinit": package})
    found: dict[str, Attention] = {}
    for name, (module, function, form) in THEIRS.items():
        if not any(part in name for part in only):
            continue  # some of them are compiled when they are imported
        try:
            loaded = __import__(f"leetDecoding.methods.{module}", fromlist=[function])
            found[name] = partial(_in_their_form, getattr(loaded, function), form)
        except Exception as error:
            print(f"{name} cannot be loaded: {type(error).__name__}: {error}")
    return found


def _in_their_form(call: Any, form: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return call(q, k, v, form(log_decay).to(q.dtype))


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
    for again in (False, True):
        _synchronize(device)
        before = _memory(device, reset=True)
        started = time.perf_counter()
        o = step()
        _synchronize(device)
        cell.milliseconds = (time.perf_counter() - started) * 1e3
        cell.mebibytes = (_memory(device) - before) / 2**20
        if not again:
            cell.error = inputs.error(o.detach())
        del o
        if cell.milliseconds > 1e4:
            break
    assert cell.error is not None
    if not cell.error <= BOUNDS[cell.dtype]:
        cell.note = f"wrong ({cell.error:.1e})"
    return step


def time_in_turns(steps: list[tuple[Cell, Callable[[], Any]]], device: torch.device) -> None:
    """Replace the first times by medians. Contestants take turns, to and fro, so that a change in clocks, or in what
    else the host does, meets all of them. Short calls begin a turn with some that are not timed, and take more turns:
    their time is the host's, which is restless."""
    times: dict[int, list[float]] = {i: [] for i in range(len(steps))}
    for turn in range(SHORT_TURNS):
        for i, (cell, step) in list(enumerate(steps))[:: 1 - turn % 2 * 2]:
            once = cell.milliseconds or 1.0
            if turn >= TURNS and once > SHORT:
                continue
            repeats = max(1, min(20, int(MILLISECONDS_A_TURN / once)))
            for _ in range(repeats // 4):
                step()
            times[i].append(statistics.median(_times(step, repeats, device)))
    for i, (cell, _) in enumerate(steps):
        cell.milliseconds = statistics.median(times[i])


def _times(step: Callable[[], Any], repeats: int, device: torch.device) -> Iterator[float]:
    """Milliseconds of each repetition; on a GPU between events, so that the host may run ahead.

    On a CPU they are the process's own, so that other programs do not count: set OMP_NUM_THREADS=1.
    """
    if device.type == "cpu":
        for _ in range(repeats):
            started = time.process_time()
            step()
            yield (time.process_time() - started) * 1e3
        return
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    yield from (a.elapsed_time(b) for a, b in pairwise(marks))


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


def tables(cells: list[Cell]) -> None:
    from rich.table import Table

    groups = sorted({(c.training, c.dtype, c.batch) for c in cells}, key=str)
    for training, dtype, batch in groups:
        mine = [c for c in cells if (c.training, c.dtype, c.batch) == (training, dtype, batch)]
        lengths = sorted({c.tokens for c in mine})
        kind = "forward and backward" if training else "forward"
        table = Table("ms", *(f"{n:,}" for n in lengths), title=f"{kind}, {dtype}, batch {batch}")
        for name in dict.fromkeys(c.contestant for c in mine):
            texts = {c.tokens: c.text for c in mine if c.contestant == name}
            table.add_row(name, *(texts.get(n, "") for n in lengths))
        _console().print(table)


def auto_against_best(cells: list[Cell]) -> dict[str, Any]:
    """How far "auto" is from the best method that was measured in the same cell: of all, and of those that it may take,
    which work under a group."""
    timed = [c for c in cells if c.contestant.startswith("leetdist") and c.milliseconds and not c.note]
    report: dict[str, Any] = {}
    for kind, names in {"all": METHODS, "sharded": cost.CANDIDATES}.items():
        ratios = {}
        for auto in (c for c in timed if c.contestant == "leetdist auto"):
            key = (auto.batch, auto.tokens, auto.dtype, auto.training)
            others = [c for c in timed if c is not auto and (c.batch, c.tokens, c.dtype, c.training) == key]
            others = [c for c in others if c.contestant.removeprefix("leetdist ") in names]
            best = min(others, key=lambda c: c.milliseconds or 0.0, default=None)
            if best is not None and best.milliseconds and auto.milliseconds:
                ratios[f"{key}: {best.contestant}"] = auto.milliseconds / best.milliseconds
        if ratios:
            within = sum(r <= 1.05 for r in ratios.values()) / len(ratios)
            report[kind] = {"cells": len(ratios), "within 5 %": within, "worst": max(ratios.values()), "ratios": ratios}
    return report


def figure(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(c.dtype, c.batch) for c in cells})
    across = -(-len(panels) // 2)
    fig, axes = plt.subplots(2, across, figsize=(5 * across, 9), squeeze=False, sharey=True)
    for axis, (dtype, batch) in zip(axes.flat, panels, strict=False):
        for name in dict.fromkeys(c.contestant for c in cells):
            line = [c for c in cells if (c.contestant, c.dtype, c.batch) == (name, dtype, batch)]
            timed = [(c.tokens, c.milliseconds) for c in line if c.milliseconds]
            if timed:
                wrong = any(c.note.startswith("wrong") for c in line)
                style = "-o" if name.startswith("leetdist") else ":x" if wrong else "--x"
                label = f"{name} (wrong)" if wrong else name
                axis.plot(*zip(*sorted(timed), strict=True), style, markersize=3, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{dtype}, batch {batch}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms")
    axes[0][0].legend(fontsize=7, loc="upper left")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def about(device: str) -> dict[str, Any]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    commit = Path(__file__).resolve().parents[1] / "COMMIT"  # of a tree that was carried without its git folder
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.read_text().strip() if commit.is_file() else git.stdout.strip() or "unknown",
        "device": _gpu_name() if device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "python": platform.python_version(),
        "dim": DIM,
    }


def _gpu_name() -> str:
    """Asked without touching the GPU: processes are forked from this one."""
    smi = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return smi.stdout.strip().splitlines()[0]


def fit(paths: list[Path]) -> None:
    """Write the constants of leetdist/methods/cost.py: least squares of relative errors, none negative."""
    content = json.loads(cost.FILE.read_text())
    for path in paths:
        result = json.loads(path.read_text())
        cells = [Cell(**c) for c in result["cells"]]
        where = "sm_90" if "H200" in result["device"] else "cpu"
        content[where]["measured"] = f"{path.name}, {result['device']}, {result['commit']}"
        for half, kind in cost.KINDS.items():
            for method in cost.CANDIDATES:
                mine = [
                    c for c in cells
                    if c.contestant == f"leetdist {method}" and (c.dtype != "fp32") == half
                    and not c.training and c.milliseconds and not c.note
                ]  # fmt: skip
                if len(mine) > 3:
                    content[where][kind][method] = [float(f"{x:.3g}") for x in _fitted(mine)]
    cost.FILE.write_text(_written(content))
    print(cost.FILE.read_text())


def _written(content: dict[str, Any]) -> str:
    """One line a method."""
    parts = []
    for where, costs in content.items():
        inner = [f'  "measured": {json.dumps(costs["measured"])}']
        for kind in cost.KINDS.values():
            methods = ",\n".join(f'   "{name}": {json.dumps(x)}' for name, x in costs[kind].items())
            inner.append(f'  "{kind}": {{\n{methods}\n  }}')
        parts.append(f' "{where}": {{\n' + ",\n".join(inner) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _fitted(cells: list[Cell]) -> list[float]:
    """fixed, per_state, per_token: the last two from cells that take longer than `fixed`, which is tried."""
    times = torch.tensor([c.milliseconds or 0.0 for c in cells], dtype=torch.float64)
    rows = [(c.batch * c.heads, c.tokens, -(-c.tokens // default_tile(c.tokens))) for c in cells]
    work = torch.tensor([[1e-6 * n * tiles, 1e-6 * n * tokens] for n, tokens, tiles in rows]).double()
    best, found = float("inf"), [0.0, 0.0, 0.0]
    for fixed in torch.logspace(-3, 3, 301).double() * times.min():
        busy = torch.ones(len(cells), dtype=torch.bool)
        for _ in range(10):
            share = _least_squares(work[busy] / times[busy, None])
            busy, before = work @ share > fixed, busy
            if int(busy.sum()) < 2 or torch.equal(busy, before):
                break
        error = float((torch.maximum(work @ share, fixed) / times - 1).square().mean())
        if error < best:
            best, found = error, [1e3 * float(fixed), *share.tolist()]
    return found


def _least_squares(columns: Tensor) -> Tensor:
    """What makes the sum of the columns nearest to 1, none negative."""
    ones = torch.ones(len(columns), 1, dtype=torch.float64)
    whole = torch.linalg.lstsq(columns, ones).solution[:, 0]
    if bool((whole >= 0).all()):
        return whole
    keep = int(whole.argmax())
    alone = torch.zeros_like(whole)
    alone[keep] = torch.linalg.lstsq(columns[:, [keep]], ones).solution[0, 0]
    return alone


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, width=None if sys.stdout.isatty() else 150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "fp16"], choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
            console=_console(stderr=True),
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
