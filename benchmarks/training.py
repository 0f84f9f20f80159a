"""Training on one long sequence sharded over 1, 2, 4, ... GPUs, under each launcher: tokens/s and memory a GPU.

    python benchmarks/training.py --model 100m --tokens 131072 --out benchmarks/results/training.json
    python benchmarks/training.py --only "torchrun, DDP" --tokens 131072 32768 --ways eager compiled --profile \\
        --layer 4096 16384 32768                        # where a step's time goes, and a layer by itself

Runs `leetdist.launch.train` (unchanged, on Python's own library as text) under torchrun with DDP and with FSDP2, under
accelerate, and under DeepSpeed where it is installed; tokens/s is the median of the steps after --skip. Rows are added
to those that --out has already. Options that are not named here are launch/train.py's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common.place import needs_gpu
from suites.scaling.report import provenance
from suites.training.options import ROW, parser

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "launch" / "configs"


def launchers(ranks: int, port: int) -> dict[str, list[str]]:
    """Commands that start trainings on so many ranks; options follow, also those of launch/train.py."""
    python, script = sys.executable, str(ROOT / "benchmarks" / "suites" / "training" / "rank.py")
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


def run(command: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """The rows that it prints, as they come; or one with the end of all else that it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    said: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        clock = threading.Timer(limit, process.terminate)
        clock.start()
        for line in process.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
            else:
                said.append(line)
        clock.cancel()
    if process.returncode:
        yield {"error": f"ended by {process.returncode}: {''.join(said).partition('failed (exitcode')[0][-2000:]}"}


def beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The row in words, beside that of one rank."""
    if "error" in row:
        return str(row["error"])
    alike = ("what", "tokens", "way")
    single = next(
        (x for x in rows if x["ranks"] == 1 and "error" not in x and all(x[k] == row[k] for k in alike)), None
    )
    if row["what"] == "layer":
        names = ("forward ms", "forward + backward ms")
        return ", ".join(f"{row[k]:.3f} {k}" + (f" (one rank {single[k]:.3f})" if single else "") for k in names)
    faster = f", x {row['tokens_per_s'] / single['tokens_per_s']:.2f}" if single else ""
    words = (
        f"{row['tokens_per_s']:,.0f} tokens/s{faster}, {row['memory_gib']:.1f} GiB a GPU, loss {row['first_loss']:.3f}"
    )
    words += f" to {row['loss']:.3f}, {row['seconds']:.0f} s"
    for name in ("parts", "groups") if row.get("traced") else ():
        whole = (single or {}).get("traced", {}).get(name, {})
        each = (
            f"{k} {x:.2f}" + (f" ({whole.get(k, 0):.2f})" if single else "") for k, x in row["traced"][name].items()
        )
        words += f"\n    {name}, ms: " + ", ".join(each)
    return words


def main() -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    available = max(1, torch.cuda.device_count())
    own.add_argument("--ranks", type=int, nargs="*", default=[p for p in (1, 2, 4, 8) if p <= available])
    own.add_argument("--only", nargs="*", default=[], help="launchers whose names begin so")
    own.add_argument("--out", type=Path)
    _, passed_on = own.parse_known_args()
    about = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=about, parents=[own, parser()])
    args, _ = whole.parse_known_args()
    if args.model == whole.get_default("model"):
        needs_gpu(whole, "--model tiny --tokens 8192 runs on a CPU")
    rows: list[dict[str, Any]] = []
    if args.out is not None and args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    for ranks in args.ranks:
        for name, command in launchers(ranks, 29600 + ranks).items():
            if args.only and ranks > 1 and not any(name.startswith(start) for start in args.only):
                continue
            for found in run([*command, *passed_on], 1.5 * args.limit):
                row = {"ranks": ranks, "launcher": name, **found}
                print(f"{ranks} ranks, {name}, {row.get('what')} {row.get('tokens')} {row.get('way')}: ", end="")
                print(beside(row, rows), flush=True)
                rows.append(row)
                if args.out is not None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    options = {k: v for k, v in vars(args).items() if k != "out"}
                    args.out.write_text(json.dumps({**provenance(), "options": options, "rows": rows}, indent=1))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
