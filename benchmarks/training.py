"""Training on one long sequence sharded over 1, 2, 4, ... GPUs, under each launcher: tokens/s and memory a GPU.

    python benchmarks/training.py --model 100m --tokens 131072 --out benchmarks/results/training.json

Runs `leetdist.launch.train` (unchanged, on Python's own library as text) under torchrun with DDP and with FSDP2, under
accelerate, and under DeepSpeed where it is installed; tokens/s is the median of the steps after --skip. Rows are added
to those that --out has already.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common.place import needs_gpu
from suites.scaling.report import provenance

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "launch" / "configs"


def launchers(ranks: int, port: int) -> dict[str, list[str]]:
    """Commands that start launch/train.py on so many ranks; its own options follow."""
    python, script = sys.executable, str(ROOT / "launch" / "train.py")
    torchrun = [python, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}", script]
    found = {"torchrun, DDP": torchrun}
    if ranks > 1 and torch.cuda.is_available():
        found["torchrun, FSDP2"] = [*torchrun, "--fsdp"]
        accelerate = [python, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml")]
        options = ["--num_processes", str(ranks), "--main_process_port", str(port)]
        found["accelerate, FSDP2"] = [*accelerate, *options, script]
    if ranks > 1 and importlib.util.find_spec("deepspeed"):
        for stage in (1, 2, 3):
            config = str(CONFIGS / f"zero{stage}.json")
            found[f"torchrun, DeepSpeed ZeRO {stage}"] = [*torchrun, "--deepspeed-config", config]
    return found


def run(command: list[str], args: argparse.Namespace) -> dict[str, float | str]:
    """Median tokens/s, most memory, last loss; or the end of what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--model",
            args.model,
            "--tokens",
            str(args.tokens),
            "--steps",
            str(args.steps),
            "--save-every",
            "-1",
        ]
        options += ["--out", folder, *(["--checkpointing"] if args.checkpointing else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        try:
            result = subprocess.run(
                [*command, *options], env=environment, capture_output=True, text=True, timeout=args.limit
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {args.limit} s"}
        if result.returncode != 0:
            return {"error": (result.stdout + result.stderr)[-2000:]}
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows[args.skip :]),
        "memory_gib": max(row["memory_gib"] for row in rows),
        "loss": rows[-1]["loss"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = max(1, torch.cuda.device_count())
    parser.add_argument("--ranks", type=int, nargs="*", default=[p for p in (1, 2, 4, 8) if p <= available])
    parser.add_argument("--only", nargs="*", default=[], help="launchers whose names begin so")
    parser.add_argument("--model", default="100m")
    parser.add_argument("--tokens", type=int, default=131_072, help="in a sequence, over all ranks")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skip", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.model == parser.get_default("model"):
        needs_gpu(parser, "--model tiny --tokens 8192 runs on a CPU")
    rows: list[dict[str, Any]] = []
    if args.out is not None and args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    single = next((row["tokens_per_s"] for row in rows if row["ranks"] == 1 and "error" not in row), None)
    for ranks in args.ranks:
        for name, command in launchers(ranks, 29600 + ranks).items():
            if args.only and ranks > 1 and not any(name.startswith(start) for start in args.only):
                continue
            begin = time.monotonic()
            row = {"ranks": ranks, "launcher": name, "tokens": args.tokens, **run(command, args)}
            rows.append(row)
            if "error" in row:
                print(f"{ranks} ranks, {name}: {row['error']}", flush=True)
            else:
                single = single or (row["tokens_per_s"] if ranks == 1 else None)
                faster = "" if single is None else f", x {row['tokens_per_s'] / single:.2f}"
                print(
                    f"{ranks} ranks, {name}: {row['tokens_per_s']:,.0f} tokens/s{faster},"
                    f" {row['memory_gib']:.1f} GiB a GPU, loss {row['loss']:.3f}, {time.monotonic() - begin:.0f} s",
                    flush=True,
                )
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                options = {k: v for k, v in vars(args).items() if k != "out"}
                args.out.write_text(json.dumps({**provenance(), "options": options, "rows": rows}, indent=1))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
