"""All contestants of benchmarks/run.py."""

from __future__ import annotations

from common.contestants import Contestant, Fla, MiniMax, Ours, Softmax
from suites.gated import MambaScan, OurMamba


def contestants(base: str | None) -> tuple[list[Contestant], dict[str, str]]:
    """Everyone who can run here, and who cannot and why."""
    everyone: list[Contestant] = [Ours(), Ours(precision="tf32"), Ours(precision="high"), OurMamba()]
    if base is not None:
        everyone.append(Ours(base))
    everyone += [Fla("chunk"), Fla("fused_chunk"), Fla("fused_recurrent"), MambaScan(), MiniMax(), Softmax()]
    missing = {c.name: reason for c in everyone if (reason := c.missing())}
    return [c for c in everyone if c.name not in missing], missing
