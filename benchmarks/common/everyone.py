"""All contestants of benchmarks/run.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from common.contestants import Contestant, Fla, MiniMax, Ours, Softmax
from suites.gated import Jla, MambaScan, OurMamba


def everyone(base: str | None) -> list[Contestant]:
    """All of them, whether they can run here or not."""
    ours: list[Contestant] = [Ours(), Ours(precision="tf32"), Ours(precision="high"), OurMamba(), OurMamba(gated=True)]
    if base is not None:
        ours.append(Ours(base))
    peers = [Fla("chunk"), Fla("fused_chunk"), Fla("fused_recurrent"), MambaScan(), MambaScan(gated=True), Jla()]
    return [*ours, *peers, MiniMax(), Softmax()]


def contestants(base: str | None) -> tuple[list[Contestant], dict[str, str]]:
    """Everyone who can run here, and who cannot and why."""
    all_of_them = everyone(base)
    with ThreadPoolExecutor() as pool:  # some try to import what they need, each in a process of its own
        reasons = list(pool.map(lambda c: c.missing(), all_of_them))
    missing = {c.name: reason for c, reason in zip(all_of_them, reasons, strict=True) if reason}
    return [c for c in all_of_them if c.name not in missing], missing
