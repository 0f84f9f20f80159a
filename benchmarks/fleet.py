"""FleetAttention over 131,072 tokens: error, time, the floor, and LeetDecoding's own kernel in the same run.

    python benchmarks/fleet.py --leetdecoding path/to/leetDecoding-0.0.3 --out benchmarks/results

The floor: 3 fp32 operations a token, rank index and column on the CUDA cores (operators/methods/fleet.py), at the clock
that the GPU reports as its highest; one operation a lane and clock, 128 lanes a multiprocessor. Beside it the rate of
fused multiply-adds that a kernel of nothing else (suites/fleet/fma.cu) reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.events import milliseconds
from common.place import needs_gpu

sys.path.insert(0, str(Path(__file__).resolve().parent))
from suites.leetdecoding.contestants import theirs
from suites.leetdecoding.report import about

import leetdist
from leetdist.engine.checks import describe
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.runtime.cuda_launch import kernel
from leetdist.operators.methods import kernels_for
from leetdist.reference import quadratic, relative_error
from leetdist.sequence.grid import default_tile

HEADS, DIM = 32, 128
# One head each: what a tile adds up grows with its memory, and so do the roundings.
METHODS = ("fleet", "causal_dot_product", "block")
DECAYS = [-1.0, -0.1, -0.01, -1e-3, -1e-4, 0.0]


def median(call: Callable[[], Any], repeats: int = 9) -> float:
    """Milliseconds of a call on the device."""
    return statistics.median(milliseconds(call, repeats))


def floor(tokens: int) -> float:
    """Milliseconds."""
    clock = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"], capture_output=True, text=True
    )
    lanes = 128 * torch.cuda.get_device_properties(0).multi_processor_count
    return 3 * HEADS * tokens * DIM * DIM / (lanes * float(clock.stdout.split()[0]) * 1e6) * 1e3


def fma_rate() -> float:
    """Fused multiply-adds a second, of a kernel that does nothing else."""
    blocks, threads, each = 8 * torch.cuda.get_device_properties(0).multi_processor_count, 256, 16 * 8192
    out = torch.empty(blocks * threads, device="cuda")
    source = str(Path(__file__).resolve().parent / "suites/fleet/fma.cu")
    launch = kernel(source, "fma_rate", torch.device("cuda", 0), ())
    return blocks * threads * each / (median(lambda: launch((blocks,), threads, out.data_ptr(), 0.5)) * 1e-3)


def measure(tokens: int, dtype: torch.dtype, other: dict[str, Any]) -> dict[str, Any]:
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, device="cuda", dtype=dtype) for _ in range(3))
    decays = {"decay": -torch.logspace(-4, -0.1, HEADS, device="cuda"), "none": torch.zeros(HEADS, device="cuda")}
    tile = default_tile(tokens)
    last = torch.arange(tile - 1, tokens, 5 * tile)  # where tiles end, what they added up is longest
    rows = torch.cat((torch.tensor([0, 1, tokens // 2 - 1, tokens // 2, tokens - 1]), last)).cuda()
    result: dict[str, Any] = {"tokens": tokens, "dtype": str(dtype), "floor ms": floor(tokens)}
    some = [x[:, : len(DECAYS)] for x in (q, k, v)]
    each = torch.tensor(DECAYS, device="cuda")
    exact = quadratic(*some, each, rows=rows)
    for method in METHODS:
        o = leetdist.linear_attention(*some, each, method=method)[:, :, rows]
        errors = {g: relative_error(o[:, h], exact[:, h]) for h, g in enumerate(DECAYS)}
        result[f"{method} error by log-decay"] = errors
    for name, log_decay in decays.items():
        for method in METHODS:
            result[f"{method} ms, {name}"] = median(
                lambda m=method, g=log_decay: leetdist.linear_attention(q, k, v, g, method=m)
            )
    log_decay, tiles = decays["decay"], Tiles(tile, (0, tokens))
    options = {"scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "tile": None}
    outputs = {"reverse": False, "scale": 1.0, "state_scale": 1.0, "out_dtype": dtype}
    for method in ("fleet", "block"):
        kernels = kernels_for(describe(q, k, v, None, method=method, **options), tokens)
        states = kernels.tile_states(k, v, log_decay, tiles, reverse=False)
        parts = {
            "tile_states": lambda kernels=kernels: kernels.tile_states(k, v, log_decay, tiles, reverse=False),
            "fold": lambda kernels=kernels, x=states: kernels.fold(x, None, log_decay, tiles, reverse=False),
            "tile_outputs": lambda kernels=kernels, x=states: kernels.tile_outputs(
                q, k, v, x, log_decay, tiles, **outputs
            ),
        }
        for name, part in parts.items():
            result[f"{method} {name} ms"] = median(part)
    if "LeetDecoding FleetAttention" in other:
        call = other["LeetDecoding FleetAttention"]
        result["LeetDecoding FleetAttention ms"] = median(lambda: call(q, k, v, log_decay), repeats=1)
        result["LeetDecoding FleetAttention error"] = relative_error(
            call(q, k, v, log_decay)[:, :1, rows], quadratic(q[:, :1], k[:, :1], v[:, :1], log_decay[:1], rows=rows)
        )
    result["over the floor"] = result["fleet ms, decay"] / result["floor ms"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--leetdecoding", help="folder that holds LeetDecoding's package")
    parser.add_argument("--out", type=Path, help="folder for the results")
    arguments = parser.parse_args()
    needs_gpu(parser)
    other = theirs(arguments.leetdecoding, only=["FleetAttention"])
    content: dict[str, Any] = {**about("cuda"), "fma a second": fma_rate(), "results": []}
    for dtype in arguments.dtypes:
        content["results"].append(measure(arguments.tokens, getattr(torch, dtype), other))
        print(json.dumps(content, indent=1))
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "fleet.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
