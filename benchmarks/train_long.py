"""Trains the 100M-parameter model on real text at long sequence lengths: tokens/s, memory, and the loss of each step.

    python benchmarks/train_long.py --out benchmarks/results/training/train_100m.json

Each `--length TOKENS:STEPS:SECONDS` is a run of `python -m leetdist.launch train` on one GPU (Python's own library as
text, bf16), stopped after its time; what it logged until then counts. Activations are recomputed in the backward; with
`:keep` behind, they are kept where they fit. Writes a JSON file and a plot beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from common.place import RUNS, needs_gpu

from leetdist.launch import train


def run(tokens: int, steps: int, seconds: float, keep: bool, more: list[str]) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        options = [
            "--model", "100m", "--tokens", str(tokens), "--steps", str(steps), "--seconds", f"{seconds:g}",
            "--save-every", "-1", "--lr", "0.002", "--warmup", "10", *([] if keep else ["--checkpointing"]), *more,
        ]  # fmt: skip
        command = ["python", "-m", "leetdist.launch", "train", *options]
        print("$", *command, flush=True)
        begin = time.perf_counter()
        ended = "in time"
        try:
            train.main([*options, "--out", out])
        except Exception as error:
            traceback.print_exc()
            ended = f"{type(error).__name__}: {error}"[:300]
        metrics = Path(out, "metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    settled = lines[2:] or lines  # the first steps compile kernels
    return {
        "command": " ".join(command), "tokens": tokens, "ended": ended, "seconds": time.perf_counter() - begin,
        "activations": "kept" if keep else "recomputed", "steps": len(lines),
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in settled) if lines else None,
        "memory_gib": max((line["memory_gib"] for line in lines), default=None),
        "loss": [round(line["loss"], 5) for line in lines],
        "grad_norm": [round(line["grad_norm"], 4) for line in lines],
    }  # fmt: skip


def plot(runs: list[dict[str, Any]], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for one in runs:
        speed = f"{one['tokens_per_s'] or 0:,.0f} tokens/s, {one['memory_gib'] or 0:.1f} GiB"
        label = f"{one['tokens']:,} tokens, activations {one['activations']}: {speed}"
        axes.plot(range(1, len(one["loss"]) + 1), one["loss"], label=label)
    axes.set(xlabel="step (one sequence each)", ylabel="loss, nats a byte", title=f"100M parameters, {device}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RUNS / "training" / "train_100m.json")
    parser.add_argument("--length", action="append", help="TOKENS:STEPS:SECONDS, or with :keep behind; may be repeated")
    options, more = parser.parse_known_args()
    if not options.length:
        needs_gpu(parser, "--length 1024:5:600 runs a short one on a CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    runs = []
    for length in options.length or ["131072:200:150", "524288:40:150"]:
        tokens, steps, seconds, *keep = length.split(":")
        one = run(int(tokens), int(steps), float(seconds), bool(keep), more)
        if keep and not one["steps"]:
            one = run(int(tokens), int(steps), float(seconds), False, more)
        runs.append(one)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"device": device, "torch": torch.__version__, "runs": runs}
        options.out.write_text(json.dumps(result) + "\n")
        plot(runs, device, options.out.with_suffix(".png"))
    for one in runs:
        shown = [f"{x:.3f}" for x in one["loss"][:: max(1, len(one["loss"]) // 6)]]
        speed = f"{one['tokens_per_s'] or 0:,.0f} tokens/s  {one['memory_gib'] or 0:.1f} GiB"
        print(f"{one['tokens']:>9,} tokens  {one['steps']} steps ({one['ended']})  {speed}  loss {' '.join(shown)}")


if __name__ == "__main__":
    main()
