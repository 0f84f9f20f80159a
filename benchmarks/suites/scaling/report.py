"""What scaling.py found, as rows, a table and a plot."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from common.revision import commit


def provenance() -> dict[str, str]:
    """The command, and the commit it ran."""
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit()}


@dataclass
class Row:
    """One measurement: seconds of the slowest rank. `local` is the same work on a rank's shard without communication,
    `single` all of it (weak: a rank's share) on one device, `model` what the cost model says."""

    what: str
    scaling: str
    transport: str
    ranks: int
    tokens: int
    call: str
    seconds: float
    single: float | None = None
    local: float | None = None
    model: float | None = None
    bytes_sent: int | None = None

    def efficiency(self) -> float | None:
        if self.single is None:
            return None
        return self.single / self.seconds / (self.ranks if self.scaling == "strong" else 1)

    def exposed(self) -> float | None:
        return None if self.local is None else self.seconds - self.local


@dataclass
class Report:
    machine: str
    tree: dict[str, str] = field(default_factory=provenance)
    checks: int = 0
    red: list[str] = field(default_factory=list)
    hops: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def cells(row: Row) -> tuple[str, ...]:
    efficiency, exposed = row.efficiency(), row.exposed()
    return (
        row.scaling, str(row.ranks), str(row.tokens), row.call, row.transport, row.what, f"{row.seconds * 1e3:.3f}",
        "" if efficiency is None else f"{efficiency:.3f}", "" if exposed is None else f"{exposed * 1e6:.0f}",
        "" if row.model is None else f"{row.model * 1e3:.3f}",
    )  # fmt: skip


def show(report: Report, heads: int, dim: int) -> str:
    lines = [report.machine, f"{report.checks} checks, {len(report.red)} differences"]
    lines += report.red[:20] + report.problems
    size = f"{4 * heads * dim * dim / 2**20:.1f} MiB"
    lines += [f"a hop of {size} in all, {name}: {s * 1e6:.1f} us" for name, s in report.hops.items()]
    head = ("scaling", "ranks", "tokens", "call", "transport", "what", "ms", "efficiency", "exposed us", "model ms")
    table: list[tuple[str, ...]] = [head]
    for row in report.rows:
        table.append(cells(row))
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(lines)


def draw(report: Report, path: Path) -> None:
    """Speed-up over one device (strong) and efficiency (weak) over ranks, forward alone and with its backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    calls = ("forward", "forward + backward")
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), squeeze=False)
    for line, kind in zip(axes, ("strong", "weak"), strict=True):
        for axis, call in zip(line, calls, strict=True):
            series: dict[str, dict[int, float]] = {}
            for row in report.rows:
                efficiency = row.efficiency()
                if row.scaling != kind or row.ranks == 1 or efficiency is None or "lanes" in row.what:
                    continue
                name, _, graph = row.call.partition(", ")
                if name != call:
                    continue
                size = row.tokens if kind == "strong" else row.tokens // row.ranks
                label = ", ".join(part for part in (row.what, row.transport, graph, f"{size:,}") if part)
                series.setdefault(label, {1: 1.0})[row.ranks] = efficiency * (row.ranks if kind == "strong" else 1)
            ranks = sorted({1, *(each for points in series.values() for each in points)})
            axis.plot(ranks, ranks if kind == "strong" else [1] * len(ranks), ":", color="grey", label="ideal")
            for label, points in series.items():
                style = "o-" if "graph" in label else "x--" if label.startswith("leetdist") else "."
                axis.plot(list(points), list(points.values()), style, label=label)
            what = "speed-up over one GPU" if kind == "strong" else "efficiency"
            axis.set(title=f"{kind} scaling, {call}", xlabel="GPUs", ylabel=what, xticks=ranks, ylim=(0, None))
            axis.legend(fontsize=6)
    figure.suptitle(report.machine)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
