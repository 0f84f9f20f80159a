"""Where a step's time goes on one GPU, from torch.profiler's trace: computing, or waiting for ranks or for the host."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Kernels by what they are for; the first pattern that is found in a name counts.
GROUPS = {
    "NCCL": r"nccl",
    "hops": r"^_(put|wait|look|release)$",  # a fold that takes a message by itself computes, though it may wait too
    "copies": r"^Mem(cpy|set)",
    "matrix products": r"nvjet|gemm|cutlass|cublas|xmma|splitK",
    "optimizer": r"multi_tensor_apply",
    "elementwise": r"^triton_|\W",  # of Inductor's, or a template of PyTorch's
    "attention": r"^\w+$",  # leetdist's names are words
}
WAITING = ("NCCL", "hops")  # kernels that may spin until another rank is ready


@dataclass(frozen=True)
class Span:
    """On the GPU, in us; `launched`: when the host came to it."""

    name: str
    begin: float
    end: float
    launched: float

    @property
    def group(self) -> str:
        return next(group for group, pattern in GROUPS.items() if re.search(pattern, self.name))


def read(events: Iterable[dict[str, Any]]) -> tuple[list[Span], float]:
    """The GPU's spans of a Chrome trace in the order of their begins, and when the host first called CUDA. The launch
    of a graph of the driver's is not traced: the next one that is stands for it."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver")
    timed = sorted((x for x in events if x.get("ph") == "X" and x.get("cat") in kinds), key=lambda x: x["ts"])
    host = [x for x in timed if x["cat"].startswith("cuda_")]
    calls = {x["args"].get("correlation"): x["ts"] for x in host}
    spans: list[Span] = []
    following = float("inf")
    for x in reversed(timed):
        if not x["cat"].startswith("cuda_"):
            following = calls.get(x["args"].get("correlation"), following)
            spans.append(Span(x["name"], x["ts"], x["ts"] + x["dur"], min(following, x["ts"])))
    return spans[::-1], min((x["ts"] for x in host), default=0.0)


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """When at least one of them runs; spans in the order of their begins."""
    pieces: list[tuple[float, float]] = []
    for span in spans:
        if pieces and span.begin <= pieces[-1][1]:
            pieces[-1] = pieces[-1][0], max(pieces[-1][1], span.end)
        else:
            pieces.append((span.begin, span.end))
    return pieces


def summary(events: Iterable[dict[str, Any]], most: int = 12) -> dict[str, Any]:
    """A step in ms: what runs how long (`groups`, `kernels`: added up, also where they overlap), and the step's parts,
    which add up to `step`: `computing`; only NCCL or hops running; idle, because the host had not come to what runs
    next (`host`), or had, and it began later (`between`)."""
    spans, begin = read(events)
    if not spans:
        return {}

    def running(without: tuple[str, ...]) -> float:
        return sum(end - begin for begin, end in union(x for x in spans if x.group not in without))

    everything = union(spans)
    host, then = 0.0, begin
    starts = iter(spans)
    for piece_begin, piece_end in everything:
        first = next(span for span in starts if span.begin == piece_begin)
        host += min(max(first.launched - then, 0.0), piece_begin - then)
        then = piece_end
    busy, step = running(()), everything[-1][1] - begin
    computing, with_nccl = running(WAITING), running(("hops",))
    parts = {
        "computing": computing, "NCCL alone": with_nccl - computing, "hops alone": busy - with_nccl,
        "host": host, "between": step - busy - host,
    }  # fmt: skip
    groups, kernels, calls = Counter[str](), Counter[str](), Counter[str]()
    for span in spans:
        groups[span.group] += span.end - span.begin  # type: ignore[assignment]
        kernels[span.name] += span.end - span.begin  # type: ignore[assignment]
        calls[span.name] += 1
    return {
        "step": _ms(step), "parts": {name: _ms(x) for name, x in parts.items()},
        "groups": {name: _ms(x) for name, x in groups.most_common()}, "launches": len(spans),
        "kernels": [[_short(name), calls[name], _ms(x)] for name, x in kernels.most_common(most)],
    }  # fmt: skip


def _ms(us: float) -> float:
    return round(us / 1e3, 3)


def _short(name: str, most: int = 100) -> str:
    """PyTorch's templates say the same again and again."""
    name = re.sub(r"at::native::|void |\(anonymous namespace\)::|c10::|std::", "", name)
    return name if len(name) <= most else f"{name[: most - 3]}..."


__all__ = ["summary"]
