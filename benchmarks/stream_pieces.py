"""A stream in short pieces against one call: python benchmarks/stream_pieces.py --out FILE

Microseconds a piece: of one call over all tokens (its share), of `stream.push` piece by piece, and of `stream.map` with
a window, where pieces are slices of one tensor or lie apart. `host` is until Python has handed all to the GPU; a CPU
computes meanwhile. `graph` is each way captured in a CUDA graph and replayed: the GPU's part, without the host. Outputs
are compared with those of the one call, with torch.equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import leetdist

Pieces = list[tuple[Tensor, ...]]


def waited() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], object], rounds: int, pieces: int) -> dict[str, float]:
    """Medians of `rounds` runs after two, in microseconds a piece."""
    hosts, totals = [], []
    for number in range(rounds + 2):
        waited()
        begin = time.perf_counter()
        run()
        host = time.perf_counter()
        waited()
        if number > 1:
            hosts.append(1e6 * (host - begin) / pieces), totals.append(1e6 * (time.perf_counter() - begin) / pieces)
    return {"host": round(statistics.median(hosts), 2), "all": round(statistics.median(totals), 2)}


def captured(way: Callable[[], list[Tensor]], expected: Tensor, rounds: int, pieces: int) -> tuple[float, bool]:
    """Of a CUDA graph of `way`, whose kernels other runs have made: microseconds a piece, and whether what it writes is
    what is expected."""
    graph, (begin, end) = torch.cuda.CUDAGraph(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        outputs = way()
    for o in outputs:
        o.zero_()
    graph.replay()
    waited()
    begin.record()
    for _ in range(rounds):  # one behind the other, so that starting one, some 300 us on a slow host, is no part of it
        graph.replay()
    end.record()
    waited()
    return round(1e3 * begin.elapsed_time(end) / rounds / pieces, 2), torch.equal(torch.cat(outputs, 2), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--piece", type=int, default=1000, help="tokens pushed at a time")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tile", type=int, default=4096, help="as calls of so many tokens choose it")
    parser.add_argument("--window", type=int, default=196_608, help="tokens that wait for each other")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, options.dtype)
    q, k, v = (torch.randn(1, options.heads, options.tokens, options.dim, device=device).to(dtype) for _ in range(3))
    log_decay = leetdist.nn.log_decay("alibi", options.heads).to(device)
    slices: Pieces = list(zip(*(x.split(options.piece, 2) for x in (q, k, v)), strict=True))
    apart: Pieces = [tuple(x.clone() for x in piece) for piece in slices]

    def one_call() -> list[Tensor]:
        return [leetdist.linear_attention(q, k, v, log_decay, method="block", tile=options.tile)]

    def pushed() -> list[Tensor]:
        stream = leetdist.stream(log_decay, tile=options.tile)
        return [stream.push(*piece) for piece in slices]

    def mapped(pieces: Pieces) -> list[Tensor]:
        return list(leetdist.stream(log_decay, tile=options.tile).map(pieces, window=options.window))

    ways: dict[str, Callable[[], list[Tensor]]] = {
        "one call": one_call,
        "push": pushed,
        "map, slices": lambda: mapped(slices),
        "map, apart": lambda: mapped(apart),
    }
    with torch.no_grad():
        (expected,) = one_call()
        same, found = {}, {}
        for name, way in ways.items():
            same[name] = torch.equal(torch.cat(way(), 2), expected)
            found[name] = timed(way, options.rounds, len(slices))
            if device == "cuda":
                found[name]["graph"], again = captured(way, expected, options.rounds, len(slices))
                same[name] = same[name] and again
    measures = [measure for measure in ("all", "graph") if measure in found["one call"]]
    names = ("tokens", "piece", "heads", "dim", "tile", "window", "dtype", "rounds")
    result = {
        "command": "python benchmarks/stream_pieces.py " + " ".join(f"--{x} {getattr(options, x)}" for x in names),
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "microseconds a piece": found,
        "times one call": {
            name: {measure: round(x[measure] / found["one call"][measure], 3) for measure in measures}
            for name, x in found.items()
        },
        "bits of one call": same,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
