"""`leetdist plan`: what a sharded call will cost on P ranks, before anybody buys them.

Predicts time on the GPUs, exposed communication, bytes on the wire and memory a rank from `leetdist.sequence.pipeline`,
prints a table, and draws strong and weak scaling beside LASP's, LASP-2's and ZeCO's formulas. The constants are H200s'
as measured, or `--measure`d here, or given: `--set hop=2e-5 link=4e10`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from leetdist.engine.checks import describe
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.launch import commands
from leetdist.launch.runtime import one_message
from leetdist.operators.methods import kernels_for
from leetdist.sequence import pipeline
from leetdist.sequence.grid import default_tile
from leetdist.sequence.pipeline import Job, Machine
from leetdist.testing.equality import lightning_slopes

# What is predicted, as programs read it, and the head of its column.
COLUMNS = {
    "ranks": "ranks", "tokens": "tokens", "lanes": "lanes", "forward_ms": "forward ms",
    "forward_exposed_us": "exposed us", "both_ms": "fwd+bwd ms", "both_exposed_us": "exposed us",
    "efficiency": "efficiency", "sent_mib": "sent MiB", "saved_mib": "saved MiB", "lasp_ms": "LASP ms",
    "lasp2_ms": "LASP-2 ms", "zeco_ms": "ZeCO ms",
}  # fmt: skip
TIMES = ("hop", "host", "launch")  # of a machine's constants
PICTURES = (".eps", ".jpg", ".pdf", ".png", ".svg", ".webp")
DIGITS = {"us": 0, "mib": 1}  # of a column whose name ends so; 3 of others


def main(argv: list[str]) -> int:
    parser = commands.plan()
    args = parser.parse_args(argv)
    if args.plot is not None:
        _check_plot(args.plot, parser)
    machine = _given(measure(args.heads, args.dim) if args.measure else Machine(), args.set, parser)
    job = Job(args.ranks, args.tokens, args.heads, args.dim, args.dim, args.batch, itemsize=args.bytes)
    forgetting = _forgetting(job) if args.slopes else 0

    counts = _counts(args.ranks)
    share = forgetting / args.heads
    scaling = {
        name: [_row(each, machine, args.layers, share) for each in jobs]
        for name, jobs in (("strong", _strong(job, counts)), ("weak", _weak(job, counts)))
    }
    if args.plot is not None:
        draw(job, machine, counts, share, args.plot)
    if args.json:
        found = {"machine": asdict(machine), "tile": job.grid, "state_bytes": job.state_bytes, "forgetting": forgetting}
        print(json.dumps({**found, **scaling}, indent=2))
        return 0
    print(f"machine: {', '.join(f'{f.name} {getattr(machine, f.name)}' for f in fields(machine))}")
    print(f"tile {job.grid} tokens; a state of {job.state_bytes / 2**20:.2f} MiB travels a hop and pass")
    print(f"heads that wait for their neighbour only: {forgetting} of {args.heads}")
    for name, rows in scaling.items():
        print(f"\n{name} scaling")
        lines = [tuple(COLUMNS.values()), *(tuple(_cells(row)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if args.plot is not None:
        print(f"\n{args.plot}")
    return 0


def measure(heads: int, dim: int) -> Machine:
    """The kernels' rates on this machine, from one call of each on enough tokens to fill it; hops are not measured."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    tokens, dtype = (65_536, torch.bfloat16) if cuda else (4_096, torch.float32)
    q, k, v = (torch.randn(1, heads, tokens, dim, device=device, dtype=dtype) for _ in range(3))
    decay = lightning_slopes(heads).to(device)
    problem = describe(
        q, k, v, decay, scale=1.0, initial_state=None, return_state=False, cu_seqlens=None, method="auto", tile=None
    )
    kernels, tiles = kernels_for(problem, tokens), Tiles(default_tile(tokens), (0, tokens))

    def states() -> torch.Tensor:
        return kernels.tile_states(k, v, decay, tiles, reverse=False)

    start = states()

    def outputs() -> torch.Tensor:
        return kernels.tile_outputs(
            q, k, v, start, decay, tiles, reverse=False, scale=1.0, state_scale=1.0, out_dtype=dtype
        )

    def fold() -> torch.Tensor | None:
        return kernels.fold(start, None, decay, tiles, reverse=False)

    size = q.numel() * q.element_size()
    machine = Machine(
        name=torch.cuda.get_device_name() if cuda else "this CPU",
        states=2 * size / _seconds(states, cuda),
        outputs=4 * size / _seconds(outputs, cuda),
        memory=2 * start.numel() * start.element_size() / _seconds(fold, cuda),
    )
    # Messages between processes of one host, by gloo over loopback.
    return machine if cuda else replace(machine, slots=1, launch=1e-4, hop=3e-4, link=1e9)


def _seconds(call: object, cuda: bool, repeat: int = 7) -> float:
    assert callable(call)
    spans = []
    for _ in range(repeat):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - begin)
    return sorted(spans)[repeat // 2]


def _given(machine: Machine, assignments: list[str], parser: argparse.ArgumentParser) -> Machine:
    known = {f.name for f in fields(Machine)} - {"name"}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in known:
            parser.error(f"--set {assignment}: the constants are {', '.join(sorted(known))}")
        try:
            constant = int(value) if name == "slots" else float(value)
        except ValueError:
            parser.error(f"--set {assignment}: {value!r} is no number")
        # Times may be 0, what is divided by may not.
        if not math.isfinite(constant) or constant < 0 or (constant == 0 and name not in TIMES):
            parser.error(f"--set {assignment}: must be finite and {'at least' if name in TIMES else 'more than'} 0")
        changes: dict[str, Any] = {name: constant}
        machine = replace(machine, **changes)
    return machine


def _check_plot(path: Path, parser: argparse.ArgumentParser) -> None:
    """Before anything is computed."""
    if path.suffix.lower() not in PICTURES or path.is_dir():
        parser.error(f"--plot {path}: must be a file whose name ends in {', '.join(PICTURES)}")
    with one_message():
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.touch()
        if not there:  # what fails before it is drawn leaves no empty picture
            path.unlink()


def _forgetting(job: Job) -> int:
    """Heads with Lightning's slopes whose decay over a tile is exactly 0."""
    return int((lightning_slopes(job.heads) * job.grid < -105).sum())


def _counts(ranks: int) -> list[int]:
    return [*(1 << i for i in range(ranks.bit_length()) if 1 << i < ranks), ranks]


def _strong(job: Job, counts: list[int]) -> list[Job]:
    return [replace(job, ranks=ranks) for ranks in counts if ranks <= ceil_div(job.tokens, job.grid)]


def _weak(job: Job, counts: list[int]) -> list[Job]:
    """As many tokens a rank as the call has on all its ranks."""
    each = max(16, job.tokens // job.ranks)
    return [replace(job, ranks=ranks, tokens=each * ranks) for ranks in counts]


def _costs(job: Job, machine: Machine, forgetting: float) -> tuple[int, pipeline.Cost, pipeline.Cost]:
    lanes = pipeline.best_lanes(
        job.batch,
        job.heads,
        job.heads,
        job.dk,
        job.dv,
        job.shards,
        job.grid,
        "cuda",
        machine=machine,
        forgetting=forgetting,
        captured=True,
    )
    there = pipeline.forward(job, machine, lanes, forgetting=forgetting)
    return lanes, there, pipeline.backward(job, machine, lanes, forgetting=forgetting)


def _efficiency(job: Job, machine: Machine, total: float) -> float:
    """Against one device with a P-th of the tokens, the grid being what it is."""
    alone = pipeline.single(replace(job, tokens=max(job.shards), tile=job.grid), machine)
    return sum(part.total for part in alone) / total


def _row(job: Job, machine: Machine, layers: int, forgetting: float) -> dict[str, float]:
    """What COLUMNS names, of one job."""
    lanes, there, back = _costs(job, machine, forgetting)
    both = there.total + back.total
    peers = [layers * formula(job, machine) * 1e3 for formula in (pipeline.lasp, pipeline.lasp2, pipeline.zeco)]
    values = (
        job.ranks, job.tokens, lanes, layers * there.total * 1e3, layers * there.exposed * 1e6, layers * both * 1e3,
        layers * (there.exposed + back.exposed) * 1e6, _efficiency(job, machine, both),
        layers * 2 * max(job.sent_bytes()) / 2**20, layers * job.saved_bytes() / 2**20, *peers,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _cells(row: dict[str, float]) -> list[str]:
    return [
        str(value) if isinstance(value, int) else f"{value:.{DIGITS.get(name.rpartition('_')[2], 3)}f}"
        for name, value in row.items()
    ]


def draw(job: Job, machine: Machine, counts: list[int], forgetting: float, path: Path) -> None:
    """Forward time over ranks: ours, and the formulas of LASP, LASP-2 and ZeCO around the same kernels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axis, name, jobs in zip(axes, ("strong", "weak"), (_strong(job, counts), _weak(job, counts)), strict=True):
        ranks = [each.ranks for each in jobs]
        ours = [_costs(each, machine, forgetting)[1].total * 1e3 for each in jobs]
        axis.plot(ranks, ours, marker="o", linewidth=2, label="leetdist")
        for label, formula in (("LASP", pipeline.lasp), ("LASP-2", pipeline.lasp2), ("ZeCO", pipeline.zeco)):
            axis.plot(ranks, [formula(each, machine) * 1e3 for each in jobs], "--", label=label)
        size = f"{job.tokens:,} tokens in all" if name == "strong" else f"{jobs[0].tokens:,} tokens a rank"
        axis.set(title=f"{name} scaling, {size}", xlabel="ranks", ylabel="forward, ms", xscale="log", yscale="log")
        axis.legend()
    figure.suptitle(f"predicted for {machine.name}: H = {job.heads}, D = {job.dk}")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
