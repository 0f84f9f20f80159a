"""What is shown and kept: a table, JSON, CSV and plots."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import platform
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from common.measure import Result
from common.revision import commit

COLUMNS = ("case", "pass", "contestant", "ms", "x floor", "vs peer", "TFLOP/s", "GB/s", "peak MiB (of inputs)", "error")


def machine(device: str, bandwidth: float) -> dict[str, Any]:
    """What the numbers were measured on."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_second": bandwidth,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }
    for name in ("triton", "flash-linear-attention", "transformers", "jax", "jax-linear-attention"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def row(result: Result) -> tuple[str, ...]:
    if result.milliseconds is None:
        return (result.case, result.which, result.contestant, result.note or "-", *[""] * 6)
    peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f} ({result.peak_share:.0%})"
    return (
        result.case,
        result.which,
        result.contestant,
        f"{result.milliseconds:.4g}",
        f"{result.x_floor:.2f}",
        "" if result.vs_peer is None else f"{result.vs_peer:.2f}",
        f"{result.tflops:.3g}",
        f"{result.gbytes:.4g}",
        peak,
        f"{result.error:.1e}",
    )


def table(results: list[Result]) -> str:
    """Columns as wide as they need to be; a failure's note may run on."""
    rows = [row(result) for result in results]
    numbers = [r for r in rows if r[4]] + [COLUMNS]
    widths = [max(len(r[i]) for r in (numbers if i >= 3 else [*rows, COLUMNS])) for i in range(len(COLUMNS))]
    lines, last = [], ("", "")
    for cells in [COLUMNS, *rows]:
        if last != cells[:2] and len(lines) > 1:
            lines.append("")
        last = cells[:2]
        left = "  ".join(cell.ljust(width) for cell, width in zip(cells[:3], widths, strict=False))
        right = "  ".join(cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True))
        lines.append(f"{left}  {right}".rstrip())
    return "\n".join(lines)


def save(results: list[Result], facts: dict[str, Any], folder: Path, name: str, *, plots: bool) -> list[Path]:
    """`name`.json, .csv and plots in `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.json", folder / f"{name}.csv"]
    document = {"machine": facts, "results": [asdict(result) for result in results]}
    written[0].write_text(json.dumps(document, indent=1) + "\n")
    with written[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    if not plots:
        return written
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return written
    matplotlib.use("Agg")
    timed = [r for r in results if r.milliseconds is not None]
    for draw, kind in ((_lines, "time"), (_bars, "bars"), (_map, "map")):
        if figure := draw(timed, facts):
            path = folder / f"{name}-{kind}.png"
            figure.savefig(path, dpi=130, bbox_inches="tight")
            written.append(path)
    return written


def _tokens(result: Result) -> int:
    return int(result.case.split(" x ")[1].split()[0].replace(",", ""))


def _lines(results: list[Result], facts: dict[str, Any]) -> Any:
    """Time against length, log-log: everyone and the floor, for cases of batch 1 that differ in N alone."""
    import matplotlib.pyplot as plt

    plain = [r for r in results if r.details.get("length")]
    passes = [p for p in ("forward", "forward + backward") if any(r.which == p for r in plain)]
    if len({r.case for r in plain}) < 2:
        return None
    figure, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes), 4.5), squeeze=False)
    for axis, which in zip(axes[0], passes, strict=True):
        chosen = [r for r in plain if r.which == which]
        for name in dict.fromkeys(r.contestant for r in chosen):
            points = sorted((_tokens(r), r.milliseconds) for r in chosen if r.contestant == name)
            width = 2.5 if name == "leetdist" else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, lw=width, label=name)
        floor = sorted({(_tokens(r), r.floor_ms) for r in chosen})
        axis.plot(*zip(*floor, strict=True), "k--", lw=1, label="memory floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=which)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{facts['device']}")
    return figure


def _bars(results: list[Result], facts: dict[str, Any]) -> Any:
    """Times over the floor, case by case."""
    import matplotlib.pyplot as plt

    passes = [p for p in ("forward", "forward + backward", "step") if any(r.which == p for r in results)]
    if not passes or any(r.details.get("situation") for r in results):
        return None
    figure, axes = plt.subplots(len(passes), 1, figsize=(11, 3.6 * len(passes)), squeeze=False)
    for axis, which in zip(axes[:, 0], passes, strict=True):
        chosen = [r for r in results if r.which == which]
        cases = list(dict.fromkeys(r.case for r in chosen))
        names = list(dict.fromkeys(r.contestant for r in chosen))
        for k, name in enumerate(names):
            of = {r.case: r for r in chosen if r.contestant == name}
            places = [i + (k - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(cases))]
            heights = [of[c].x_floor if c in of else 0 for c in cases]
            bars = axis.bar(places, heights, 0.8 / len(names), label=name)
            labels = [f"{h:.1f}" if h else "" for h in heights]
            axis.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
        axis.axhline(1, color="k", ls="--", lw=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(cases)), cases, fontsize=8)
        axis.set_ylabel("time / memory floor")
        axis.set_title(which)
        axis.margins(y=0.2)
        axis.legend(fontsize=7)
    figure.suptitle(f"{facts['device']}")
    figure.tight_layout()
    return figure


def _map(results: list[Result], facts: dict[str, Any]) -> Any:
    """Situations down, contestants and passes across; a cell's colour is its distance to the floor."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    found = {(r.case, r.contestant, r.which): r.x_floor for r in results if r.details.get("situation")}
    if not found:
        return None
    cases = list(dict.fromkeys(case for case, _, _ in found))
    across = list(dict.fromkeys((who, which) for _, who, which in found))
    across.sort(key=lambda column: (column[0] != "leetdist", column))
    cells = [[found.get((case, *column)) or float("nan") for column in across] for case in cases]
    figure, axis = plt.subplots(figsize=(3.5 + 1.1 * len(across), 1.5 + 0.26 * len(cases)))
    axis.imshow(cells, aspect="auto", cmap="RdYlGn_r", norm=LogNorm(1, 30))
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell == cell:
                axis.text(j, i, f"{cell:.3g}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(across)), ["\n".join(column) for column in across], fontsize=7)
    plain = [case if " heads first" in case or "views" in case else f"{case} (B, N, H, D) views" for case in cases]
    axis.set_yticks(range(len(cases)), [name.replace(" heads first", "") for name in plain], fontsize=7)
    axis.xaxis.tick_top()
    axis.set_xlabel(f"times the memory floor; {facts['device']}", fontsize=8)
    return figure
