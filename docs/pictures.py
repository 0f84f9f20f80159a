"""Draws the pictures of the documentation into docs/pictures, each for light and for dark pages.

    python docs/pictures.py                 all of them: two minutes on two cores
    python docs/pictures.py decays exact    some

`scan` is drawn by hand; the others need matplotlib, and show what leetdist computes here, on the CPU: `decays` are the
ladders of leetdist.nn, `exact` folds the states of real tiles in several associations, `pipeline` is the trace of one
call on four virtual ranks, `cost` measures time and memory against length.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import leetdist
from leetdist.engine import trace
from leetdist.nn import LADDERS, log_decay

FOLDER = Path(__file__).parent / "pictures"
# Pages: their text, faint lines, and the colours of lines and boxes.
LIGHT = {
    "text": "#24292f",
    "faint": "#8c959f",
    "box": "#ddf4ff",
    "line": "#0969da",
    "warm": "#bc4c00",
    "soft": "#fff1e5",
}
DARK = {
    "text": "#e6edf3",
    "faint": "#7d8590",
    "box": "#12283f",
    "line": "#58a6ff",
    "warm": "#f0883e",
    "soft": "#3d2412",
}
PAGES = {"light": LIGHT, "dark": DARK}
SERIES = ("line", "warm", "text", "faint")


# The picture of the scan.


def scan(colours: dict[str, str], step: int = 0) -> str:
    """Four ranks and what they do; of the steps 1, 2 and 3 only one in full colour, or all of them for 0."""
    width, height, left, gap, box = 900, 316, 150, 14, 172
    xs = [left + rank * (box + gap) for rank in range(4)]
    parts: list[str] = []

    def shown(number: int) -> str:
        return "" if step in (0, number) else ' opacity="0.22"'

    def text(x: float, y: float, words: str, size: int = 15, anchor: str = "middle", colour: str = "text") -> str:
        return (
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colours[colour]}">{words}</text>'
        )

    def boxes(number: int, y: float, high: float, words: tuple[str, str], fill: str) -> None:
        parts.append(f"<g{shown(number)}>")
        parts.append(text(0, y + high / 2 - 3, f"{number}. {words[0]}", 14, "start"))
        parts.append(text(0, y + high / 2 + 15, words[1], 12, "start", "faint"))
        for x in xs:
            parts.append(
                f'<rect x="{x}" y="{y}" width="{box}" height="{high}" rx="7" fill="{colours[fill]}" '
                f'stroke="{colours["line"]}"/>'
            )
        parts.append("</g>")

    def arrow(x0: float, y: float, x1: float, colour: str) -> str:
        head = math.copysign(9, x1 - x0)
        return (
            f'<path d="M{x0} {y}H{x1 - head}" stroke="{colours[colour]}" stroke-width="2.5"/>'
            f'<path d="M{x1} {y}l{-head} -5v10z" fill="{colours[colour]}"/>'
        )

    for rank, x in enumerate(xs):
        parts.append(text(x + box / 2, 18, f"rank {rank}"))
        parts.append(text(x + box / 2, 36, f"tokens {32 * rank}k to {32 * (rank + 1)}k", 12, colour="faint"))
    boxes(1, 50, 62, ("tile sums", "all ranks at once"), "box")
    parts.append(f"<g{shown(1)}>")
    for x in xs:
        for tile in range(4):
            at = x + 12 + tile * 38
            parts.append(
                f'<rect x="{at}" y="62" width="34" height="38" rx="3" fill="none" stroke="{colours["faint"]}"/>'
            )
            parts.append(text(at + 17, 86, "k vᵀ", 12))
    parts.append("</g>")

    parts.append(f"<g{shown(2)}>")
    parts.append(text(0, 158, "2. the scan", 14, "start"))
    parts.append(text(0, 176, "one state a head", 12, "start", "faint"))
    for x in xs[:-1]:
        parts.append(arrow(x + box / 2 + 20, 146, x + box * 1.5 + gap - 20, "line"))
        parts.append(arrow(x + box * 1.5 + gap - 20, 190, x + box / 2 + 20, "warm"))
    for x in xs:
        middle = x + box / 2
        parts.append(f'<circle cx="{middle}" cy="146" r="16" fill="{colours["box"]}" stroke="{colours["line"]}"/>')
        parts.append(text(middle, 151, "S"))
        parts.append(f'<circle cx="{middle}" cy="190" r="16" fill="{colours["soft"]}" stroke="{colours["warm"]}"/>')
        parts.append(text(middle, 195, "dS", 13))
    parts.append("</g>")

    boxes(3, 226, 46, ("outputs", "all ranks at once"), "box")
    parts.append(f"<g{shown(3)}>")
    parts.extend(text(x + box / 2, 254, "o = q S + …") for x in xs)
    parts.append("</g>")
    words = (
        "S = decay · S + sum, tile by tile from the left, in one order on any number of ranks; gradients from the right"
    )
    parts.append(text(left + 2 * box + 1.5 * gap, 302, words, 14, colour="faint"))
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-6 0 {width} {height}" font-family="{font}">'
    return "\n".join([head, *parts, "</svg>", ""])


# Plots.


def figure(colours: dict[str, str], columns: int, high: float = 3.2) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {
        "svg.hashsalt": "leetdist", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
        "text.color": colours["text"], "axes.labelcolor": colours["text"], "xtick.color": colours["text"],
        "ytick.color": colours["text"], "axes.edgecolor": colours["faint"], "axes.facecolor": "none",
        "figure.facecolor": "none", "grid.color": colours["faint"], "grid.alpha": 0.3, "axes.grid": True,
        "axes.axisbelow": True,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    plt.rcParams.update(style)
    return plt.subplots(1, columns, figsize=(9, high), layout="constrained", squeeze=False)


def decays(colours: dict[str, str]) -> Any:
    """Half-lives by head, in the first, middle and last of 24 layers of 32 heads."""
    heads, layers = 32, 24
    names = [name for name in LADDERS if name != "none"]
    made, axes = figure(colours, len(names), 2.8)
    for axis, name in zip(axes[0], names, strict=True):
        for layer, colour in zip((0, layers // 2, layers - 1), SERIES, strict=False):
            slopes = -log_decay(name, heads, layer, layers)
            x = [head for head in range(heads) if slopes[head] > 0]
            axis.plot(x, [math.log(2) / float(slopes[head]) for head in x], color=colours[colour], label=f"{layer}")
        axis.set(yscale="log", title=name, xlabel="head", ylim=(0.1, 3e7))
    axes[0][0].set_ylabel("half-life, tokens")
    axes[0][0].legend(title="layer", loc="upper left", fontsize=8)
    for axis in axes[0][1:]:
        axis.tick_params(labelleft=False)
    return made


@cache
def associations() -> tuple[list[int], dict[str, list[tuple[float, float]]]]:
    """Numbers of ranks, and for each way to share the fold: the share of the final state's numbers whose bits are not
    one rank's, and by how many units of the last place the worst of them differs."""
    tiles, size, heads, dim = 64, 256, 8, 64
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(heads, tiles, size, dim, generator=generator) for _ in range(2))
    decay = log_decay("retnet", heads)[:, None]
    weight = torch.exp(decay * torch.arange(size - 1, -1, -1.0))[:, None, :, None]
    added = (k * weight).mT @ v  # what each tile adds to the state: (heads, tiles, dim, dim)
    keep = torch.exp(decay * size)[..., None]

    def fold(state: Tensor, parts: Tensor) -> Tensor:
        for part in parts.unbind(1):
            state = keep * state + part
        return state

    zero = torch.zeros(heads, dim, dim)
    one_rank = fold(zero, added)

    def differences(state: Tensor) -> tuple[float, float]:
        return float((state != one_rank).float().mean()), float((bits(state) - bits(one_rank)).abs().max())

    ranks, found = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32], {"shards": [], "tree": [], "leetdist": []}
    for count in ranks:
        mine = [(keep ** part.shape[1], fold(zero, part)) for part in added.tensor_split(count, 1)]
        state = zero
        for kept, part in mine:
            state = kept * state + part
        found["shards"].append(differences(state))
        while len(mine) > 1:  # neighbours first
            pairs = [(a[0] * b[0], b[0] * a[1] + b[1]) for a, b in zip(mine[::2], mine[1::2], strict=False)]
            mine = pairs + mine[2 * len(pairs) :]
        found["tree"].append(differences(mine[0][1]))
        state = zero
        for part in added.tensor_split(count, 1):
            state = fold(state, part)
        found["leetdist"].append(differences(state))
    return ranks, found


def bits(x: Tensor) -> Tensor:
    """Numbers in the order of their values, one apart where no other fp32 lies between."""
    whole = x.contiguous().view(torch.int32).long()
    return torch.where(whole < 0, -(whole & 0x7FFFFFFF), whole)


def exact(colours: dict[str, str]) -> Any:
    made, axes = figure(colours, 2, 2.9)
    ranks, found = associations()
    labels = {"shards": "each rank sums its shard first", "tree": "the same, as a tree", "leetdist": "leetdist"}
    for (name, values), colour in zip(found.items(), ("warm", "faint", "line"), strict=True):
        for axis, index, factor in ((axes[0][0], 0, 100), (axes[0][1], 1, 1)):
            axis.plot(ranks, [factor * x[index] for x in values], "o-", color=colours[colour], label=labels[name])
    for axis, label in zip(axes[0], ("numbers with other bits, %", "worst, units of the last place"), strict=True):
        axis.set(xscale="log", xlabel="ranks", ylabel=label)
        axis.minorticks_off()
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axes[0][1].set(yscale="symlog", ylim=(-0.5, None))
    axes[0][0].legend(loc="center right", fontsize=8)
    return made


@cache
def traced() -> list[dict[str, Any]]:
    """The spans of one forward and backward call on four virtual ranks, the second of two."""
    q, k, v = (torch.randn(1, 8, 65_536, 64, requires_grad=True) for _ in range(3))
    decay = log_decay("alibi", 8)

    def rank(group: Any) -> None:
        mine = [leetdist.shard_sequence(x.detach(), 2, group).requires_grad_() for x in (q, k, v)]
        leetdist.linear_attention(*mine, decay, scale=0.125, group=group).sum().backward()

    leetdist.virtual_ranks(rank, ranks=4)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        trace.start(str(file))
        leetdist.virtual_ranks(rank, ranks=4)
        trace.stop()
        return [event for event in json.loads(file.read_text() + "]") if event["ph"] == "X"]


def pipeline(colours: dict[str, str]) -> Any:
    spans = traced()
    begin = min(span["ts"] for span in spans)
    made, axes = figure(colours, 1, 2.9)
    names = sorted({span["name"] for span in spans}, key=lambda name: min(s["ts"] for s in spans if s["name"] == name))
    palette = dict(
        zip(names, ("#0969da", "#1a7f37", "#bf8700", "#8250df", "#cf222e", "#bc4c00", "#6e7781"), strict=False)
    )
    for span in spans:
        bar = axes[0][0].barh(
            span["pid"], span["dur"] / 1e3, left=(span["ts"] - begin) / 1e3, height=0.7,
            color=palette.get(span["name"], "#6e7781"),
        )  # fmt: skip
        bar.set_label("_")
    for name in names:
        axes[0][0].barh(0, 0, color=palette.get(name, "#6e7781"), label=name)
    axes[0][0].set(xlabel="milliseconds", yticks=range(4), yticklabels=[f"rank {rank}" for rank in range(4)])
    axes[0][0].invert_yaxis()
    axes[0][0].legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=len(names), fontsize=8)
    return made


def attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return leetdist.linear_attention(q, k, v, decay)


def softmax(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return leetdist.linear_attention(q, k, v, decay, method="vanilla")


@cache
def costs() -> dict[str, tuple[list[int], list[float], list[float]]]:
    """By name: lengths, seconds of one core for a forward call, and the MiB that its process needed for it at most."""
    contestants = {
        "leetdist": (attention, 262_144),
        "softmax attention (SDPA)": (softmax, 16_384),
        "masked product": (masked, 4_096),
    }
    lengths = {name: [1024 << i for i in range(9) if 1024 << i <= most] for name, (_, most) in contestants.items()}
    found = {}
    libc = ctypes.CDLL(None)
    # glibc: what a tensor took goes back to the system with it, and is counted anew; for the times it is kept, as ever.
    for measure, kept in ((mebibytes, 1 << 16), (seconds, 1 << 25)):
        libc.mallopt(-3, kept)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 * kept)  # M_TRIM_THRESHOLD
        for name, (call, _) in contestants.items():
            for length in lengths[name]:
                q, k, v = (torch.randn(1, 4, length, 64) for _ in range(3))
                found[name, length, measure] = measure(call, q, k, v, log_decay("alibi", 4))
    return {
        name: (of, [found[name, x, seconds] for x in of], [found[name, x, mebibytes] for x in of])
        for name, of in lengths.items()
    }


def seconds(call: Callable[..., Tensor], *tensors: Tensor) -> float:
    call(*tensors)
    least = math.inf
    for _ in range(5):
        begin = time.process_time()  # of this process: others may be busy
        call(*tensors)
        least = min(least, time.process_time() - begin)
    return least


def mebibytes(call: Callable[..., Tensor], *tensors: Tensor) -> float:
    call(*tensors)
    before = peak(reset=True)
    call(*tensors)
    return peak() - before


def peak(*, reset: bool = False) -> float:
    """MiB that this process had at most, since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cost(colours: dict[str, str]) -> Any:
    made, axes = figure(colours, 2)
    for (name, (lengths, times, memory)), colour in zip(costs().items(), SERIES, strict=False):
        axes[0][0].plot(lengths, times, "o-", color=colours[colour], label=name)
        axes[0][1].plot(lengths, memory, "o-", color=colours[colour], label=name)
    for axis, label in zip(axes[0], ("seconds of one core", "MiB, output included"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    axes[0][0].legend(loc="lower right", fontsize=8)
    return made


PLOTS = {"decays": decays, "exact": exact, "pipeline": pipeline, "cost": cost}


def main(wanted: list[str]) -> None:
    torch.manual_seed(0)
    for name in wanted or ["scan", *PLOTS]:
        for page, colours in PAGES.items():
            if name == "scan":
                for step, suffix in enumerate(("", "-1", "-2", "-3")):
                    (FOLDER / f"scan{suffix}-{page}.svg").write_text(scan(colours, step))
            else:
                made = PLOTS[name](colours)
                made.savefig(FOLDER / f"{name}-{page}.svg", metadata={"Date": None}, transparent=True)
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
