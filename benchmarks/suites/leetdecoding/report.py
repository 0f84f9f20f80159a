"""What benchmarks/leetdecoding.py measured: cells, tables, the figure, and the cost model fitted to them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.revision import commit
from torch import Tensor

from leetdist.engine.checks import METHODS
from leetdist.operators import cost
from leetdist.operators.refusals import SHORTEST_ON_HOPPER
from leetdist.sequence.grid import default_tile

DIM = 128


@dataclass
class Cell:
    """milliseconds: of calls in a row; device_milliseconds: where the device has them all before it."""

    contestant: str
    dtype: str
    batch: int
    tokens: int
    training: bool
    heads: int
    milliseconds: float | None = None
    device_milliseconds: float | None = None
    mebibytes: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def text(self) -> str:
        time = "" if self.milliseconds is None else f"{self.milliseconds:.3g}"
        return f"{time} {self.note}".strip()


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
        console().print(table)


def auto_against_best(cells: list[Cell]) -> dict[str, Any]:
    """How far "auto" is from the best method that was measured in the same cell: of all, and of those that it may take,
    which work under a group; by the time of calls in a row, and by the device's."""
    timed = [c for c in cells if c.contestant.startswith("leetdist") and c.milliseconds and not c.note]
    report: dict[str, Any] = {}
    for of, names in {"all": METHODS, "sharded": cost.SHARDED}.items():
        for by, time in {"in a row": _in_a_row, "on the device": _on_the_device}.items():
            ratios = {}
            for auto in (c for c in timed if c.contestant == "leetdist auto"):
                key = (auto.batch, auto.tokens, auto.dtype, auto.training)
                others = [c for c in timed if c is not auto and (c.batch, c.tokens, c.dtype, c.training) == key]
                others = [c for c in others if c.contestant.removeprefix("leetdist ") in names and time(c)]
                best = min(others, key=time, default=None)
                if best is not None and time(auto):
                    ratios[f"{key}: {best.contestant}"] = time(auto) / time(best)
            if ratios:
                within = sum(r <= 1.05 for r in ratios.values()) / len(ratios)
                worst = max(ratios.values())
                report[f"{of}, {by}"] = {
                    "cells": len(ratios), "within 5 %": within, "worst": worst, "ratios": ratios,
                }  # fmt: skip
    return report


def _in_a_row(cell: Cell) -> float:
    return cell.milliseconds or 0.0


def _on_the_device(cell: Cell) -> float:
    return cell.device_milliseconds or 0.0


def figure(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(c.dtype, c.batch) for c in cells})
    across = -(-len(panels) // 2)
    fig, axes = plt.subplots(2, across, figsize=(5 * across, 10), squeeze=False, sharey=True)
    names = list(dict.fromkeys(c.contestant for c in cells))
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    lines = {}
    for axis, (dtype, batch) in zip(axes.flat, panels, strict=False):
        for name in names:
            line = [c for c in cells if (c.contestant, c.dtype, c.batch) == (name, dtype, batch)]
            timed = [(c.tokens, c.milliseconds) for c in line if c.milliseconds]
            if not timed:
                continue
            style = "-o" if name.startswith("leetdist") else "--x"
            if any(c.note.startswith("wrong") for c in line):
                style = ":x"
            # "auto" lies on the line of the method that it takes, and is to be seen beside it.
            width = {"linewidth": 7, "alpha": 0.35, "markersize": 0} if name == "leetdist auto" else {"markersize": 3}
            (drawn,) = axis.plot(*zip(*sorted(timed), strict=True), style, color=colours[name], **width)
            lines.setdefault(name, drawn)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{dtype}, batch {batch}")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms")
    title = "dotted: relative errors beyond what the dtype explains"
    fig.legend(lines.values(), lines, title=title, loc="lower center", ncols=4, fontsize=9)
    fig.tight_layout(rect=(0, 0.12, 1, 1))
    fig.savefig(path, dpi=110)


def about(device: str) -> dict[str, Any]:
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "device": _gpu_name() if device == "cuda" else platform.processor() or "cpu",
        "hopper": os.environ.get("LEETDIST_HOPPER", "1") != "0",  # or the general kernels
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
    """Write the constants of leetdist/operators/cost.py: least squares of relative errors, none negative."""
    content = json.loads(cost.FILE.read_text())
    for path in paths:
        result = json.loads(path.read_text())
        cells = [Cell(**c) for c in result["cells"]]
        where = "cpu" if "NVIDIA" not in result["device"] else "sm_90" if result["hopper"] else "general"
        older = set(cost.SHARDED)
        for half, kind in cost.KINDS.items():
            for method in cost.SHARDED:
                mine = [
                    c for c in cells
                    if c.contestant == f"leetdist {method}" and (c.dtype != "fp32") == half
                    and not c.training and c.milliseconds and not c.note and _tells(c, where)
                ]  # fmt: skip
                if len(mine) > 3:
                    content[where][kind][method] = [float(f"{x:.3g}") for x in _fitted(mine)]
                    older.discard(method)
        kept = "".join(f"; {method} from before" for method in sorted(older))
        content[where]["measured"] = f"{path.name}, {result['device']}, {result['commit']}{kept}"
    cost.FILE.write_text(_written(content))
    print(cost.FILE.read_text())


def _tells(cell: Cell, where: str) -> bool:
    """Whether a cell tells of its method's own kernels there."""
    tile = default_tile(cell.tokens)
    shortest = SHORTEST_ON_HOPPER["wide"] if where == "sm_90" and cell.dtype == "fp32" else 0
    return tile >= shortest and (tile > cost.LIGHTNING_BLOCK or cell.contestant != "leetdist lightning")


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


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, width=None if sys.stdout.isatty() else 150)
