"""python benchmarks/ways.py --out FILE: what other ways to a faster pass would cost, on a Hopper GPU.

Each is an experiment of its own (suites/ways/*.cu), right first and then timed, a line of JSON each; notes/ways.md says
what was predicted and what follows. 131,072 tokens, bf16, 32 heads of 128 x 128, unless a line says otherwise.

handover: a state of 64 KB that passes from tile to tile through the second cache, or a cluster's shared memory, as a
one-pass forward would hand it on; by itself, and with the 4 units of memory that such a pass must move.
cluster: a cluster of four blocks a head that walks the whole sequence; its copies alone.
products: cycles of a multiprocessor for a chunk's products; those of today, of two running sums, of such a cluster.
short: each kernel of a forward, and all, launched from a CUDA graph, with blocks of 64 or 128 columns.
decode: a step of decoding, launched from a CUDA graph of one or of many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common.events import milliseconds
from torch import Tensor

import leetdist
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, launches
from leetdist.kernels.constant_decay.triton.fold import fold
from leetdist.kernels.constant_decay.triton.step import step
from leetdist.kernels.runtime.cuda_launch import Kernel, kernel
from leetdist.kernels.runtime.nvrtc import cubin
from leetdist.sequence.grid import default_tile

SUITE = Path(__file__).resolve().parent / "suites/ways"
HEADS, TOKENS, PIECE = 32, 131072, 64 * 256  # bytes of 64 tokens of a head
STATE = 128 * 128
BANDWIDTH = 4.28e12  # of a copy (notes/README.md)
FLOOR = 4 * HEADS * TOKENS * 256 / BANDWIDTH * 1e3
MODES = ("a flag a warp", "numbers with tags", "bulk copies", "clusters of 8")
Row = dict[str, Any]


def source_of(source: str, **defines: int) -> tuple[str, tuple[tuple[str, int], ...]]:
    return str(SUITE / f"{source}.cu"), tuple({"HALF": 0, "GROUPS": 1, **defines}.items())


def made(source: str, name: str, memory: int, **defines: int) -> Kernel:
    path, macros = source_of(source, **defines)
    return kernel(path, name, torch.device("cuda", 0), macros, shared_memory=memory, features="a")


def compile_all(ways: list[str]) -> None:
    """Machine code of all experiments to the cache, several at a time."""
    wanted: list[tuple[str, dict[str, int]]] = []
    if "handover" in ways:
        cases = [*((128, *case, 0) for case in ALONE), *((*case, 1) for case in WITH_TRAFFIC)]
        wanted += [("handover", dict(zip(DEFINED, case, strict=True))) for case in cases]
    if "cluster" in ways:
        wanted += [("cluster", {"MULTICAST": multicast, "STAGES": stages}) for multicast, stages in WALKS]
    if "products" in ways:
        wanted += [("products", {"MODE": mode}) for mode in range(len(COUNTED))]
    sources = [source_of(source, **defines) for source, defines in wanted]
    for name in ("tile_states", *launches.OUTPUTS) if "short" in ways else ():
        for columns in (64, 128):
            made = launches.defines(name, 128, columns, 1, torch.bfloat16, False, False, size=(128, 128))
            sources.append((f"constant_decay/cuda/{name.split()[0]}.cu", made))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda found: cubin(found[0], "sm_90a", found[1]), sources))


def median_and_least(call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> tuple[float, float]:
    """Milliseconds of a call on the device; `before` is not timed."""
    times = milliseconds(call, 9, warm=2, before=before)
    return round(statistics.median(times), 4), round(min(times), 4)


def processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


# ---------------------------------------------------------------------------------------------------- handover

DEFINED = ("TILE", "MODE", "WORKERS", "SPLITS", "TRAFFIC")
# The first four with the memory traffic, and mode, threads and splits without.
WITH_TRAFFIC = [
    (128, 0, 128, 1), (128, 0, 256, 1), (128, 1, 256, 1), (128, 1, 256, 2), (128, 3, 256, 1),
    (256, 0, 256, 1), (256, 1, 256, 1), (256, 1, 256, 2), (256, 3, 256, 1),
    (512, 0, 256, 1), (512, 1, 256, 1), (512, 1, 256, 2),
]  # fmt: skip
ALONE = [
    (0, 128, 1), (0, 256, 1), (0, 256, 2), (1, 256, 1), (1, 512, 1), (1, 256, 2), (2, 128, 1), (3, 128, 1), (3, 256, 1),
]  # fmt: skip


class Handover:
    """One compilation of handover.cu, and what it works on."""

    def __init__(self, tile: int, mode: int, workers: int, splits: int, traffic: bool) -> None:
        self.tile, self.mode, self.workers, self.splits, self.traffic = tile, mode, workers, splits, traffic
        pieces = (tile // 64 if tile <= 256 else 2) if traffic else 0
        self.memory = pieces * (PIECE + PIECE // splits) + 2 * PIECE * traffic
        self.memory += (mode > 1) * STATE * 4 // splits + 1024
        defines = dict(zip(DEFINED, (tile, mode, workers, splits, int(traffic)), strict=True))
        self.kernel = made("handover", "handover", self.memory, **defines)

    def time(self, heads: int, tiles: int, data: Tensor) -> Row:
        chains, size = heads * self.splits, STATE // self.splits
        slots = torch.zeros(chains, 2, 2 * size, device="cuda")
        flags = torch.zeros(chains * 32 * 8 + 1, device="cuda", dtype=torch.int32)
        each = max(1, min(2048 // self.workers, 227 * 1024 // (self.memory + 1024), 2))
        blocks = processors() // 8 * 8 if self.mode == 3 else each * processors()

        def reset() -> None:
            slots.zero_(), flags.zero_()

        def call() -> None:
            self.kernel(
                (blocks,), self.workers, *(x.data_ptr() for x in data), slots.data_ptr(), flags.data_ptr(),
                flags[-1:].data_ptr(), heads, tiles, 0.9,
            )  # fmt: skip

        reset(), call()
        torch.cuda.synchronize()
        wanted = [0.0] * 4
        for tile in range(tiles):
            wanted = [0.9 * x + tile % 7 + 1 + i for i, x in enumerate(wanted)]
        first = slots[:, (tiles - 1) % 2, : size // 4 * 4].reshape(chains, -1, 4)[:, :, 0]
        error = (first / torch.tensor(wanted, device="cuda").repeat(size // 16) - 1).abs().max().item()
        assert error < 1e-5, f"the last state is wrong by {error}"
        if self.traffic:
            tokens = tiles * self.tile
            same = torch.equal(data[3, :, :tokens], data[0, :, :tokens])
            assert same, "what was written is not what was read"
        median, least = median_and_least(call, reset)
        return {
            "way": "handover", "travels by": MODES[self.mode], "threads": self.workers, "programs a state": self.splits,
            "heads": heads, "tiles": tiles, "ms": median, "least": least, "us a hop": round(median * 1e3 / tiles, 3),
        }  # fmt: skip


def handovers() -> Iterator[Callable[[], list[Row]]]:
    data = torch.randint(0, 9, (4, HEADS, TOKENS, 128), device="cuda", dtype=torch.int16)  # q, k, v, o

    def alone(mode: int, workers: int, splits: int) -> list[Row]:
        experiment = Handover(128, mode, workers, splits, False)
        return [experiment.time(*case, data) | {"traffic": False} for case in ((1, 1024), (HEADS, 1024), (HEADS, 256))]

    def moving(tile: int, mode: int, workers: int, splits: int) -> list[Row]:
        data[3].zero_()
        row = Handover(tile, mode, workers, splits, True).time(HEADS, TOKENS // tile, data)
        return [row | {"traffic": True, "tile": tile, "x floor": round(row["ms"] / FLOOR, 3)}]

    for case in ALONE:
        yield lambda case=case: alone(*case)
    for case in WITH_TRAFFIC:
        yield lambda case=case: moving(*case)


# ---------------------------------------------------------------------------------------------------- cluster, products


WALKS = [(1, 3), (1, 5), (0, 3), (0, 5)]  # multicast, stages


def clusters() -> Iterator[Callable[[], list[Row]]]:
    data = torch.randint(0, 9, (4, HEADS, TOKENS, 128), device="cuda", dtype=torch.int16)

    def walk(multicast: int, stages: int) -> list[Row]:
        memory = stages * (2 * PIECE + PIECE // 4) + 1024
        launch = made("cluster", "walk", memory, MULTICAST=multicast, STAGES=stages)
        data[3].zero_()

        def call() -> None:
            launch((4 * HEADS,), 64, *(x.data_ptr() for x in data), TOKENS // 64)

        median, least = median_and_least(call)
        assert torch.equal(data[3], data[2]), "what was written is not what was read"
        row = {"way": "cluster", "multicast": bool(multicast), "stages": stages, "ms": median, "least": least}
        return [row | {"x floor": round(median / FLOOR, 3)}]

    for case in WALKS:
        yield lambda case=case: walk(*case)


COUNTED = {"today": 2048, "two running sums": 3072, "32 columns of a cluster": 704}


def products() -> Iterator[Callable[[], list[Row]]]:
    chunks = 2000

    def rows(mode: int, name: str) -> list[Row]:
        launch, found = made("products", "products", 6 * 8192 + 1024, MODE=mode), []
        for each in (1, 2):
            blocks = each * processors()
            out = torch.empty(blocks * 128, device="cuda")
            cycles = torch.zeros(blocks, device="cuda", dtype=torch.int64)
            for _ in range(3):
                launch((blocks,), 128, out.data_ptr(), chunks, cycles.data_ptr())
            measured = statistics.median(cycles.tolist()) / chunks / each
            row = {"way": "products", "of": name, "warpgroups": each, "cycles a chunk": round(measured)}
            found.append(row | {"counted": COUNTED[name]})
        return found

    for mode, name in enumerate(COUNTED):
        yield lambda mode=mode, name=name: rows(mode, name)


# ---------------------------------------------------------------------------------------------------- short


def in_graph(call: Callable[[], Any], times: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


@contextmanager
def shared_by(columns: int | None) -> Iterator[None]:
    """Blocks of the kernels in CUDA C++ hold so many columns of a tile's state, or as many as is usual (None)."""
    usual = launches.shares
    if columns:
        launches.shares = lambda *_: (columns, 1, 128 // columns)
    launches.parts.cache_clear()
    try:
        yield
    finally:
        launches.shares = usual
        launches.parts.cache_clear()


SHARED = ("states", "outputs, twice", "all three")


def shorts() -> Iterator[Callable[[], list[Row]]]:
    def rows(tokens: int) -> list[Row]:
        q, k, v = (torch.randn(1, HEADS, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        slopes = -torch.exp2(-8 * (torch.arange(HEADS, device="cuda") + 1) / HEADS)
        tile, scale = default_tile(tokens), 128**-0.5
        tiles = Tiles(tile, (0, tokens))
        states = torch.zeros(1, HEADS, tiles.count, 128, 128, device="cuda")
        o = torch.empty_like(v)
        outputs = {"reverse": False, "scale": scale, "state_scale": scale, "out_dtype": torch.bfloat16, "out": o}
        calls = {
            "states": lambda: hopper.tile_states(k, v, slopes, tiles, reverse=False, to_end=False, out=states),
            "fold": lambda: fold(states, None, slopes, tiles, reverse=False, to_end=False),
            "outputs, twice": lambda: hopper.tile_outputs(q, k, v, states, slopes, tiles, **outputs),
            "all three": lambda: [calls[name]() for name in ("states", "fold", "outputs, twice")],
            "forward": lambda: leetdist.linear_attention(q, k, v, slopes, scale=scale),
        }
        times, found = 20 if tokens < 65536 else 5, []
        for columns in (None, 64, 128):
            for name, call in calls.items():
                if columns and name not in SHARED:
                    continue
                calls["states"](), calls["fold"]()  # what the fold makes of its own results grows without bound
                with shared_by(columns):
                    graph = in_graph(call, times)
                median, least = median_and_least(graph.replay)
                row = {"way": "short", "tokens": tokens, "tile": tile, "of": name, "columns": columns or "usual"}
                row |= {"us": round(median * 1e3 / times, 2), "least": round(least * 1e3 / times, 2)}
                found.append(row)
        return found

    for tokens in (2048, 8192, 32768, TOKENS):
        yield lambda tokens=tokens: rows(tokens)


def decodings() -> Iterator[Callable[[], list[Row]]]:
    def rows(batch: int) -> list[Row]:
        q, k, v = (torch.randn(batch, HEADS, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        state = torch.randn(batch, HEADS, 128, 128, device="cuda")
        slopes = -torch.exp2(-8 * (torch.arange(HEADS, device="cuda") + 1) / HEADS)
        floor, found = 2 * state.nbytes / BANDWIDTH * 1e6, []
        for times in (1, 64):
            graph = in_graph(lambda: step(q, k, v, state, slopes, scale=0.1, out=state), times)
            median, least = median_and_least(graph.replay)
            row = {"way": "decode", "batch": batch, "steps in a graph": times, "us": round(median * 1e3 / times, 2)}
            found.append(row | {"least": round(least * 1e3 / times, 2), "floor": round(floor, 2)})
        return found

    for batch in (1, 32, 256):
        yield lambda batch=batch: rows(batch)


def main() -> None:
    ways = {
        "handover": handovers, "cluster": clusters, "products": products, "short": shorts, "decode": decodings,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=list(ways), help=f"of {', '.join(ways)}")
    parser.add_argument("--out", type=Path, help="a file of JSON, written anew after each experiment")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no experiment begins later")
    options = parser.parse_args()
    began, failed = time.monotonic(), 0
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "floor ms": round(FLOOR, 4),
    }
    results: list[Row] = []
    print(json.dumps(about), flush=True)
    compile_all(options.ways)
    for way in options.ways:
        for experiment in ways[way]():
            if time.monotonic() - began > options.seconds:
                print(f"no time for the rest of {way}", flush=True)
                break
            try:
                found = experiment()
            except Exception:  # the others may be right
                failed += 1
                traceback.print_exc()
                continue
            results += found
            for row in found:
                print(json.dumps(row), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
        torch.cuda.empty_cache()
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
