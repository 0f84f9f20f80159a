"""Draws what benchmarks/inference.py measured.

python benchmarks/suites/inference/plot.py benchmarks/results/inference/inference-h200.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(path: Path) -> None:
    """Latency of a token against context, and memory against the length of the prompt."""
    results = json.loads(path.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    alone = [r for r in results.get("contexts", []) if r["batch"] == 1 and r.get("sdpa_us")]
    x = [r["context"] for r in alone]
    left.loglog(x, [r["sdpa_us"] for r in alone], "s-", label="SDPA with a KV cache")
    for ours in (r for r in results.get("operator_decode", []) if r["batch"] == 1):
        left.loglog(x, [min(ours["step"], ours["pooled, by index"])] * len(x), "o-", label="leetdist")
        if ours.get("fla fused_recurrent"):
            left.loglog(x, [ours["fla fused_recurrent"]] * len(x), "^--", label="fla fused_recurrent")
    left.set(xlabel="tokens of context", ylabel="us a token and layer, batch 1", title="Decoding")
    right.loglog(x, [r["cache_gib"] for r in alone], "s-", label="KV cache of one layer")
    held = results["heads"] * results["dim"] ** 2 * 4 / 2**30
    right.loglog(x, [held] * len(x), "o-", label="leetdist: state of one layer")
    for key, label in (("streamed", "operator, streamed from the host"), ("model_prefill", "100M model, prompt")):
        rows = results.get(key, [])
        peak = "host_peak_gib" if key == "streamed" else "peak_gib"
        if rows:
            right.loglog([r["tokens"] for r in rows], [r[peak] for r in rows], "d-", label=f"{label}: peak")
    right.set(xlabel="tokens", ylabel="GiB of GPU memory", title="Memory")
    for axis in (left, right):
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    dtype = results["dtype"].removeprefix("torch.")
    figure.suptitle(f"{results['device']}, {results['heads']} heads of {results['dim']}, {dtype}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
