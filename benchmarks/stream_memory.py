"""Ten million tokens through one process: the memory of a stream does not grow with what it has seen.

python benchmarks/stream_memory.py --out benchmarks/results/inference/stream_memory_cpu.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from rich.progress import track

import leetdist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10 * 2**20)
    parser.add_argument("--piece", type=int, default=2**16, help="tokens pushed at a time")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    log_decay = -torch.logspace(-5, -2, options.heads)
    stream = leetdist.stream(log_decay, scale=options.dim**-0.5, tile=4096)
    peaks: dict[int, float] = {}
    pieces = options.tokens // options.piece
    begin = time.perf_counter()
    for piece in track(range(1, pieces + 1), "streaming"):
        q, k, v = (torch.randn(1, options.heads, options.piece, options.dim) for _ in range(3))
        stream.push(q, k, v)
        if piece & (piece - 1) == 0 or piece == pieces:
            peaks[piece * options.piece] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    seconds = time.perf_counter() - begin
    result = {
        "command": f"python benchmarks/stream_memory.py --tokens {options.tokens} --piece {options.piece} "
        f"--heads {options.heads} --dim {options.dim}",
        "machine": f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds with drawing the inputs": seconds,
        "peak MiB of the process by tokens": peaks,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
