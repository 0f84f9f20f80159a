"""How the operator scales over GPUs: one run verifies, measures, compares with peers and with the cost model.

    torchrun --nproc-per-node=8 benchmarks/scaling.py --graphs --out benchmarks/results/scaling

On the CPU (gloo) it runs with small sizes, to be tested: --device cpu --tokens 4096 --weak 512 --heads 4 --dim 32.

1. Equality: the shards on P ranks against one device, bit for bit, forward and backward, on every transport.
2. Strong and weak scaling, forward and forward + backward: time of the slowest rank (median of --repeat calls, each
   begun together), efficiency, what communication adds to the same local work, bytes, latency of a hop.
3. Peers around the same kernels: an all-gather of states (LASP-2's scheme), a blocking serial ring (LASP's); and fla on
   one GPU, where it is installed.
4. The cost model's prediction beside what was measured.

Nothing is timed while a check is red. Results: OUT.json, OUT.png and a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import schemes
import torch
import torch.distributed as dist
from torch import Tensor

import leetdist
from leetdist.launch.runtime import Rank, joined
from leetdist.sequence import cost
from leetdist.sequence.grid import default_tile, shard_lengths
from leetdist.sequence.group import resolve
from leetdist.testing.equality import Case, check, lightning_slopes


@dataclass
class Row:
    """One measurement: seconds of the slowest rank. `local` is the same work on a rank's shard without communication,
    `single` all of it (weak: a rank's share) on one device, `model` what the cost model says."""

    what: str
    scaling: str
    transport: str
    ranks: int
    tokens: int
    call: str
    seconds: float
    single: float | None = None
    local: float | None = None
    model: float | None = None
    bytes_sent: int | None = None

    def efficiency(self) -> float | None:
        if self.single is None:
            return None
        return self.single / self.seconds / (self.ranks if self.scaling == "strong" else 1)

    def exposed(self) -> float | None:
        return None if self.local is None else self.seconds - self.local


@dataclass
class Report:
    machine: str
    checks: int = 0
    red: list[str] = field(default_factory=list)
    hops: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Bench:
    """The groups of this job (the first P ranks, once for every transport), clocks, and the report."""

    def __init__(self, me: Rank, args: argparse.Namespace) -> None:
        self.me, self.args = me, args
        self.cuda = me.device.type == "cuda"
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.report = Report(f"{me.size} x {name}, torch {torch.__version__}")
        self.kinds = ["p2p", "symmetric"] if self.cuda else ["p2p"]
        self.transports: dict[tuple[str, int], Any] = {}
        for ranks in (ranks for ranks in (2, 3, 4, 5, 7, 8, 16, 32, 64) if ranks <= me.size):
            for kind in self.kinds:
                group = dist.new_group(list(range(ranks)))
                with self.survive(f"{kind} on {ranks} ranks"):
                    if me.rank < ranks:
                        self.transports[kind, ranks] = resolve(group, kind)

    @contextmanager
    def survive(self, what: str) -> Iterator[None]:
        """One part's failure is noted, and the others go on."""
        try:
            yield
        except (RuntimeError, ValueError, AssertionError, ImportError) as error:
            self.report.problems.append(f"{what}: {type(error).__name__}: {error}")
            print(f"rank {self.me.rank}: {self.report.problems[-1]}", flush=True)

    def seconds(self, call: Callable[[], Any], group: dist.ProcessGroup | None) -> float:
        """Median over the calls of the slowest rank's time in `group`; of this rank's without one."""
        times: list[Any] = []
        for number in range(self.args.warmup + self.args.repeat):
            if group is not None and self.cuda:
                dist.all_reduce(torch.zeros(1, device=self.me.device), group=group)
            elif group is not None:
                dist.barrier(group)
            begin = self.now()
            call()
            if number >= self.args.warmup:
                times.append((begin, self.now()))
        if self.cuda:
            torch.cuda.synchronize()
        spans = [begin.elapsed_time(end) / 1e3 if self.cuda else end - begin for begin, end in times]
        slowest = torch.tensor(spans, dtype=torch.float64, device=self.me.device)
        if group is not None:
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        return statistics.median(slowest.tolist())

    def add(self, row: Row) -> None:
        """Keep a measurement, also in the file: a run that is cut short has what it got."""
        self.report.rows.append(row)
        if self.me.first:
            print("  ".join(cells(row)), flush=True)
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            self.args.out.with_suffix(".json").write_text(json.dumps(asdict(self.report), indent=1))

    def now(self) -> Any:
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if self.cuda else _clock()


_clock = time.perf_counter


def verify(bench: Bench) -> None:
    """Part 1."""
    base = Case(bench.args.check_tokens, bench.args.dim, bench.args.dim, heads=bench.args.heads)
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        cases += [
            replace(base, dtype=dtype, decay="none"),
            replace(base, dtype=dtype, decay="mixed", uneven=True, initial=True, model_layout=True),
            replace(base, dtype=dtype, decay="gone", uneven=True),
            replace(base, dtype=dtype, documents=(0, 1, base.tokens // 3 + 5, base.tokens // 2, base.tokens)),
        ]
    for (kind, ranks), transport in bench.transports.items():
        for seed, case in enumerate(cases):
            with bench.survive(f"check of {case} on {ranks} ranks"):
                found = check(case, transport, bench.me.device, seed)
                bench.report.red += [f"{case}, {ranks} ranks, {kind}: {difference}" for difference in found]
                bench.report.checks += 1
    everyone: list[Any] = [None] * bench.me.size
    dist.all_gather_object(everyone, (bench.report.red, bench.report.problems))
    bench.report.red = [line for red, _ in everyone for line in red]
    bench.report.problems = [line for _, problems in everyone for line in problems]


def hops(bench: Bench) -> None:
    """Latency of one state from rank 0 to rank 1 and back, halved."""
    args, times = bench.args, 20
    state = torch.randn(1, args.heads, args.dim, args.dim, device=bench.me.device)
    for kind in bench.kinds:
        transport = bench.transports.get((kind, 2))
        if transport is None:
            continue

        def there_and_back(transport: Any = transport) -> None:
            other = 1 - transport.rank
            for _ in range(times):
                if transport.rank == 0:
                    transport.send_state(state, other, "a hop")
                with transport.receive_state(tuple(state.shape), state, other, "a hop") as received:
                    if transport.rank == 1:
                        transport.send_state(received, other, "a hop")
            transport.flush()

        with bench.survive(f"hops of {kind}"):
            transport.reserve(state.numel() * state.element_size(), state.device)
            bench.report.hops[kind] = bench.seconds(there_and_back, transport.group) / times / 2
            if bench.args.graphs:
                graph = captured(there_and_back)
                bench.report.hops[f"{kind}, CUDA graph"] = bench.seconds(graph, transport.group) / times / 2


def scaling(bench: Bench) -> None:
    """Part 2, and the peers of part 3 at the same sizes."""
    powers = [ranks for ranks in (1, 2, 4, 8, 16, 32, 64) if ranks <= bench.me.size]
    single: dict[tuple[int, str], float] = {}
    for weak, size in [*((False, n) for n in bench.args.tokens), *((True, n) for n in bench.args.weak)]:
        for ranks in powers:
            for kind in bench.kinds if ranks > 1 else ["one device"]:
                transport = bench.transports.get((kind, ranks))
                if bench.me.rank < ranks and (ranks == 1 or transport is not None):
                    with bench.survive(f"{size} tokens on {ranks} ranks, {kind}"):
                        measure(bench, weak, kind, ranks, size, transport, single)
                        if ranks == 1 or kind == "p2p":
                            measure_peers(bench, weak, kind, ranks, size, transport, single)
            dist.barrier()
            if bench.cuda:
                torch.cuda.empty_cache()


def measure(
    bench: Bench, weak: bool, kind: str, ranks: int, size: int, transport: Any, single: dict[tuple[int, str], float]
) -> None:
    """The operator at one size: on the ranks of `transport`, and this rank's part of it alone."""
    tokens = size * ranks if weak else size
    tile = default_tile(tokens)
    mine = shard_lengths(tokens, ranks, tile)[bench.me.rank]
    group = None if transport is None else transport.group
    tensors = schemes.inputs(mine, bench.args, bench.me.device)
    calls, locally = passes(bench, tensors, tile, transport), passes(bench, tensors, tile, None)
    for name in calls:
        for graph in (False, True) if bench.args.graphs else (False,):
            call, alone = calls[name], locally[name]
            sent, label = None, f"{name}, CUDA graph" if graph else name
            if transport is not None and not graph:
                sent = -transport.bytes_sent
                call()
                sent += transport.bytes_sent
            if graph:
                torch.cuda.empty_cache()
                call, alone = captured(call), captured(alone) if transport is not None else None
            seconds = bench.seconds(call, group)
            local = None if transport is None else bench.seconds(alone, group)
            del call, alone
            if transport is None:
                single[size, label] = seconds
            bench.add(
                Row(
                    "leetdist", "weak" if weak else "strong", kind, ranks, tokens, label, seconds,
                    single.get((size, label)), local, model(bench, tokens, ranks, name), sent,
                )
            )  # fmt: skip


def passes(bench: Bench, tensors: list[Tensor], tile: int, transport: Any) -> dict[str, Callable[[], Any]]:
    """The operator on this rank's tokens, forward alone and with its backward."""
    q, k, v, do = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    decay = lightning_slopes(bench.args.heads).to(bench.me.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return leetdist.linear_attention(q, k, v, decay, group=transport, tile=tile)

    def both() -> Any:
        o = leetdist.linear_attention(*leaves, decay, group=transport, tile=tile)
        return torch.autograd.grad(o, leaves, do)

    return {"forward": forward, "forward + backward": both}


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph, whose replay takes next to nothing of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def model(bench: Bench, tokens: int, ranks: int, name: str) -> float | None:
    if not bench.cuda:
        return None  # its constants are a GPU's
    job = cost.Job(ranks, tokens, bench.args.heads, bench.args.dim, bench.args.dim)
    forgets = float((lightning_slopes(job.heads) * job.grid < -105).float().mean())
    shape = (1, job.heads, job.heads, job.dk, job.dv, job.shards, job.grid)
    lanes = cost.best_lanes(*shape, "cuda", forgetting=forgets)
    there = cost.forward(job, cost.Machine(), lanes, forgetting=forgets).total
    back = cost.backward(job, cost.Machine(), lanes, forgetting=forgets).total
    return there if name == "forward" else there + back


def measure_peers(
    bench: Bench, weak: bool, kind: str, ranks: int, size: int, transport: Any, single: dict[tuple[int, str], float]
) -> None:
    tokens = size * ranks if weak else size
    tile = default_tile(tokens)
    mine = shard_lengths(tokens, ranks, tile)[bench.me.rank]
    group = None if transport is None else transport.group
    if transport is None:
        made = schemes.fla(mine, bench.args, bench.me.device)
    else:
        made = schemes.around_our_kernels(mine, tile, transport, bench.args, bench.me.device)
    for (what, name), call in made.items():
        reference = single.get((size, name)) if ranks > 1 else None
        seconds = bench.seconds(call, group)
        bench.add(Row(what, "weak" if weak else "strong", kind, ranks, tokens, name, seconds, reference))


def cells(row: Row) -> tuple[str, ...]:
    efficiency, exposed = row.efficiency(), row.exposed()
    return (
        row.scaling, str(row.ranks), str(row.tokens), row.call, row.transport, row.what, f"{row.seconds * 1e3:.3f}",
        "" if efficiency is None else f"{efficiency:.3f}", "" if exposed is None else f"{exposed * 1e6:.0f}",
        "" if row.model is None else f"{row.model * 1e3:.3f}",
    )  # fmt: skip


def show(report: Report, heads: int, dim: int) -> str:
    lines = [report.machine, f"{report.checks} checks on rank 0, {len(report.red)} differences on any"]
    lines += report.red[:20] + report.problems
    lines += [
        f"a hop of {4 * heads * dim * dim / 2**20:.1f} MiB, {k}: {s * 1e6:.1f} us" for k, s in report.hops.items()
    ]
    head = ("scaling", "ranks", "tokens", "call", "transport", "what", "ms", "efficiency", "exposed us", "model ms")
    table: list[tuple[str, ...]] = [head]
    for row in report.rows:
        table.append(cells(row))
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(lines)


def draw(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for axis, kind in zip(axes, ("strong", "weak"), strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in report.rows:
            efficiency = row.efficiency()
            if row.scaling == kind and row.ranks > 1 and efficiency is not None:
                size = row.tokens if kind == "strong" else row.tokens // row.ranks
                name = f"{row.what}, {row.transport}, {row.call}, {size:,}"
                series.setdefault(name, [(1, 1.0)]).append((row.ranks, efficiency))
        for name, points in series.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=f"{kind} scaling: {report.machine}", xlabel="ranks", ylabel="efficiency", ylim=(0, 1.2))
        axis.legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("scaling"), help="results go to OUT.json and OUT.png")
    parser.add_argument("--tokens", type=int, nargs="*", default=[131_072, 1_048_576], help="strong scaling, in all")
    parser.add_argument("--weak", type=int, nargs="*", default=[16_384, 131_072], help="weak scaling, a rank")
    parser.add_argument("--check-tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--graphs", action="store_true", help="measure CUDA graphs of the calls too")
    args = parser.parse_args(argv)
    with joined(args.device) as me:
        bench = Bench(me, args)
        verify(bench)
        me.print(f"{bench.report.checks} checks, {len(bench.report.red)} differences")
        if not bench.report.red:
            for part in (hops, scaling):
                with bench.survive(part.__name__):
                    part(bench)
                dist.barrier()
        if me.first:
            args.out.with_suffix(".json").write_text(json.dumps(asdict(bench.report), indent=1))
            with bench.survive("the plot"):
                draw(bench.report, args.out.with_suffix(".png"))
            print(show(bench.report, args.heads, args.dim), flush=True)
        return 1 if bench.report.red or bench.report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
