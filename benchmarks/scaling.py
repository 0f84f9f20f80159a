"""How the operator scales over GPUs: one run verifies, measures, compares with peers and with the cost model.

    torchrun --nproc-per-node=8 benchmarks/scaling.py --graphs symmetric --out benchmarks/results/scaling

On the CPU (gloo) it runs with small sizes, to be tested: --device cpu --tokens 4096 --weak 512 --heads 4 --dim 32.

1. Equality: the shards on P ranks against one device, bit for bit, forward and backward, on every transport.
2. Strong and weak scaling, forward and forward + backward: time of the slowest rank (median of --repeat calls, each
   begun together; with --in-a-row also so many calls in a row, as a program makes them), efficiency, what communication
   adds to the same local work, bytes, latency of a hop.
3. Peers around the same kernels: an all-gather of states (LASP-2's scheme), a blocking serial ring (LASP's); and fla on
   one GPU, where it is installed.
4. The cost model's prediction beside what was measured.

--operator token and mamba2 time a decay a token, learnt, without 3 and 4.

Nothing is timed while a check of the dtype that is timed is red. Results: OUT.json, OUT.png and a table; the file is
written after each part, and --seconds starts nothing new when they are over. The first rank compiles alone, the others
then find it in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common.place import RUNS, needs_gpu
from suites.scaling import schemes
from suites.scaling.report import Report, Row, cells, draw, show
from torch import Tensor

import leetdist
from leetdist.launch.runtime import Rank, joined
from leetdist.sequence import pipeline
from leetdist.sequence.grid import default_tile, shard_lengths
from leetdist.sequence.group import resolve
from leetdist.testing.equality import Case, check, compute, lightning_slopes, make_tensors


class Bench:
    """The groups of this job (the first P ranks, once for every transport), clocks, and the report."""

    def __init__(self, me: Rank, args: argparse.Namespace) -> None:
        self.me, self.args, self.begin = me, args, time.monotonic()
        self.cuda = me.device.type == "cuda"
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.report = Report(f"{me.size} x {name}, torch {torch.__version__}")
        self.kinds = args.transports if self.cuda else ["p2p"]
        self.groups: list[tuple[str, int]] = []
        self.transports: dict[tuple[str, int], Any] = {}

    def set_up(self, sizes: list[int]) -> list[tuple[str, int]]:
        """A group of so many ranks for every transport; the list is the same on every rank."""
        added = [(kind, ranks) for ranks in sizes if ranks <= self.me.size for kind in self.kinds]
        for kind, ranks in added:
            group = dist.new_group(list(range(ranks)))
            with self.survive(f"{kind} on {ranks} ranks"):
                if self.me.rank < ranks:
                    self.transports[kind, ranks] = resolve(group, kind)
            self.me.print(f"{time.monotonic() - self.begin:.0f} s  {kind} on {ranks} ranks is set up")
        self.groups += added
        return added

    def in_time(self) -> bool:
        """Whether there is time for more; every rank of the job asks together and hears the same."""
        left = torch.tensor(self.args.seconds - (time.monotonic() - self.begin), device=self.me.device)
        dist.broadcast(left, 0)
        return bool(left > 0)

    @contextmanager
    def survive(self, what: str) -> Iterator[None]:
        """One part's failure is noted, and the others go on."""
        try:
            yield
        except (RuntimeError, ValueError, AssertionError, ImportError) as error:
            self.report.problems.append(f"{what}: {type(error).__name__}: {error}")
            print(f"rank {self.me.rank}: {self.report.problems[-1]}", flush=True)

    def seconds(self, call: Callable[[], Any], group: dist.ProcessGroup | None, *, in_a_row: int = 1) -> float:
        """Median over rows of so many calls, a call, of the slowest rank's time in `group`; of this rank's without
        one."""
        times: list[Any] = []
        for number in range(self.args.warmup + self.args.repeat):
            if group is not None and self.cuda:
                dist.all_reduce(torch.zeros(1, device=self.me.device), group=group)
            elif group is not None:
                dist.barrier(group)
            begin = self.now()
            for _ in range(in_a_row):
                call()
            if number >= self.args.warmup:
                times.append((begin, self.now()))
        if self.cuda:
            torch.cuda.synchronize()
        spans = [begin.elapsed_time(end) / 1e3 if self.cuda else end - begin for begin, end in times]
        slowest = torch.tensor(spans, dtype=torch.float64, device=self.me.device)
        if group is not None:
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        return statistics.median(slowest.tolist()) / in_a_row

    def add(self, row: Row) -> None:
        """Keep a measurement, also in the file: a run that is cut short has what it got."""
        self.report.rows.append(row)
        if self.me.first:
            print(f"{time.monotonic() - self.begin:.0f} s ", "  ".join(cells(row)), flush=True)
            save(self)

    def now(self) -> Any:
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if self.cuda else _clock()


_clock = time.perf_counter
GRAPH, IN_A_ROW, ONE_THREAD = ", CUDA graph", ", in a row", ", in the calling thread"


def save(bench: Bench) -> None:
    if bench.me.first:
        bench.args.out.parent.mkdir(parents=True, exist_ok=True)
        bench.args.out.with_suffix(".json").write_text(json.dumps(asdict(bench.report), indent=1))


def verify(bench: Bench, dtype: torch.dtype, groups: list[tuple[str, int]]) -> None:
    """Part 1."""
    args = bench.args
    base = Case(args.check_tokens, args.dim, args.dim, heads=args.heads, dtype=dtype, learnt=False)
    shared = max(1, args.heads // 4)
    mamba2 = replace(base, dv=args.dim // 2, heads=2 * args.heads, q_heads=shared, kv_heads=shared)
    mamba2 = replace(mamba2, v_heads=2 * args.heads, decay="restarts", initial=True, model_layout=True, learnt=True)
    cases = [
        replace(base, decay="none"),
        replace(base, decay="mixed", uneven=True, initial=True, model_layout=True),
        replace(base, documents=(0, 1, base.tokens // 3 + 5, base.tokens // 2, base.tokens)),
        replace(base, decay="gone", uneven=True, learnt=True),
        replace(base, decay="tokens", uneven=True, learnt=True),
        mamba2,
    ]
    for seed, case in enumerate(cases):
        if bench.me.first:
            compute(case, make_tensors(case, bench.me.device, seed), None)
        dist.barrier()
        for kind, ranks in groups:
            transport = bench.transports.get((kind, ranks))
            if not bench.in_time():
                break
            found = []
            with bench.survive(f"check of {case} on {ranks} ranks"):
                if transport is not None:
                    found = [str(difference) for difference in check(case, transport, bench.me.device, seed)]
            everyone = bench.me.gather(found, "what differs")
            bench.report.red += [f"{case}, {ranks} ranks, {kind}: {line}" for lines in everyone for line in lines]
            bench.report.checks += 1
            words = "differs" if any(everyone) else "equal"
            bench.me.print(f"{time.monotonic() - bench.begin:.0f} s  {words}: {case}, {ranks} ranks, {kind}")


def hops(bench: Bench) -> None:
    """Latency of one state, of all heads and of one, from rank 0 to rank 1 and back, halved."""
    args, times = bench.args, 20
    for kind, heads in [(kind, heads) for kind in bench.kinds for heads in (args.heads, 1)]:
        transport = bench.transports.get((kind, 2))
        if transport is None:
            continue
        state = torch.randn(1, heads, args.dim, args.dim, device=bench.me.device)

        def there_and_back(transport: Any = transport, state: Tensor = state) -> None:
            other = 1 - transport.rank
            for _ in range(times):
                if transport.rank == 0:
                    transport.send_state(state, other, "a hop")
                with transport.receive_state(tuple(state.shape), state, other, "a hop") as received:
                    if transport.rank == 1:
                        transport.send_state(received, other, "a hop")
            transport.flush()

        name = kind if heads == args.heads else f"{kind}, one head"
        with bench.survive(f"hops of {name}"):
            transport.reserve(state.numel() * state.element_size(), state.device)
            bench.report.hops[name] = bench.seconds(there_and_back, transport.group) / times / 2
            if kind in bench.args.graphs:
                graph = captured(there_and_back)
                bench.report.hops[f"{name}, CUDA graph"] = bench.seconds(graph, transport.group) / times / 2


def scaling(bench: Bench) -> None:
    """Part 2, and the peers of part 3 at the same sizes."""
    powers = [ranks for ranks in (1, 2, 4, 8, 16, 32, 64) if ranks <= bench.me.size]
    single: dict[tuple[int, str], float] = {}
    sizes = [*((False, n) for n in bench.args.tokens), *((True, n) for n in bench.args.weak)]
    for weak, size in sorted(sizes, key=lambda size: size[1]):
        for ranks in powers:
            if not bench.in_time():
                bench.me.print(f"no time for {size} tokens on {ranks} ranks")
                continue
            for kind in bench.kinds if ranks > 1 else ["one device"]:
                transport = bench.transports.get((kind, ranks))
                if bench.me.rank < ranks and (ranks == 1 or transport is not None):
                    with bench.survive(f"{size} tokens on {ranks} ranks, {kind}"):
                        measure(bench, weak, kind, ranks, size, transport, single)
                        for lanes in bench.args.lanes if kind == bench.kinds[-1] else []:
                            os.environ["LEETDIST_LANES"] = str(lanes)
                            measure(bench, weak, kind, ranks, size, transport, single, f"leetdist, lanes: {lanes}")
                            del os.environ["LEETDIST_LANES"]
                        if ranks == 1 or kind == "p2p":
                            measure_peers(bench, weak, kind, ranks, size, transport, single)
            dist.barrier()
            if bench.cuda:
                torch.cuda.empty_cache()


def measure(
    bench: Bench, weak: bool, kind: str, ranks: int, size: int, transport: Any, single: dict[tuple[int, str], float],
    what: str = "leetdist",
) -> None:  # fmt: skip
    """The operator at one size: on the ranks of `transport`, and this rank's part of it alone."""
    tokens = size * ranks if weak else size
    tile = default_tile(tokens)
    mine = shard_lengths(tokens, ranks, tile)[bench.me.rank]
    group = None if transport is None else transport.group
    tensors = schemes.inputs(mine, bench.args, bench.me.device)
    calls, locally = passes(bench, tensors, tile, transport), passes(bench, tensors, tile, None)
    for name in calls:
        ways = [("", 1)]
        if bench.args.in_a_row:
            ways.append((IN_A_ROW, bench.args.in_a_row))
            if "backward" in name:
                ways.append((IN_A_ROW + ONE_THREAD, bench.args.in_a_row))
        if kind in bench.args.graphs or (ranks == 1 and bench.args.graphs):
            ways.append((GRAPH, 1))
        for way, in_a_row in ways if what == "leetdist" else ways[-1:]:
            call, alone = calls[name], locally[name]
            sent, label, graph = None, name + way, way == GRAPH
            if ONE_THREAD in way:
                call, alone = in_one_thread(call), in_one_thread(alone)
            if transport is not None and not graph:
                sent = -transport.bytes_sent
                call()
                sent += transport.bytes_sent
            if graph:
                torch.cuda.empty_cache()
                call, alone = captured(call), captured(alone) if transport is not None else None
            seconds = bench.seconds(call, group, in_a_row=in_a_row)
            local = None if transport is None else bench.seconds(alone, group, in_a_row=in_a_row)
            del call, alone
            if transport is None:
                single[size, label] = seconds
            bench.add(
                Row(
                    what, "weak" if weak else "strong", kind, ranks, tokens, label, seconds,
                    single.get((size, label)), local, model(bench, tokens, ranks, name, graph), sent,
                )
            )  # fmt: skip


def passes(bench: Bench, tensors: tuple[Tensor, ...], tile: int, transport: Any) -> dict[str, Callable[[], Any]]:
    """The operator on this rank's tokens, forward alone and with its backward."""
    q, k, v, do, log_decay = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if learnt := bench.args.operator != "constant":
        leaves.append(log_decay.detach().requires_grad_())

    def forward() -> Tensor:
        with torch.no_grad():
            return leetdist.linear_attention(q, k, v, log_decay, group=transport, tile=tile)

    def both() -> Any:
        o = leetdist.linear_attention(*leaves, *([] if learnt else [log_decay]), group=transport, tile=tile)
        return torch.autograd.grad(o, leaves, do)

    return {"forward": forward, "forward + backward": both}


def in_one_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call without PyTorch's change of threads for a backward pass, which a training step has once, not a layer."""

    def called() -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return call()

    return called


def captured(call: Callable[[], Any], mode: str = "thread_local") -> Callable[[], None]:
    """The call as a CUDA graph, whose replay takes next to nothing of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not "global": NCCL's watchdog thread looks at events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        kept = call()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def model(bench: Bench, tokens: int, ranks: int, name: str, graph: bool) -> float | None:
    if not bench.cuda or bench.args.operator != "constant":
        return None  # its constants are a GPU's, and a decay a head's
    job = pipeline.Job(ranks, tokens, bench.args.heads, bench.args.dim, bench.args.dim)
    forgetting = float((lightning_slopes(job.heads) * job.grid < -105).float().mean())
    shape = (1, job.heads, job.heads, job.dk, job.dv, job.shards, job.grid)
    wanted = os.environ.get("LEETDIST_LANES")
    lanes = int(wanted or pipeline.best_lanes(*shape, "cuda", forgetting=forgetting, captured=graph))
    # On one device there is no lane to launch, and what the host takes is not modelled.
    there, back = pipeline.times(job, pipeline.Machine(), lanes, forgetting=forgetting, captured=graph or ranks == 1)
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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, or cpu (cuda)")
    parser.add_argument("--out", type=Path, default=RUNS / "scaling", help="results go to OUT.json and OUT.png")
    parser.add_argument("--tokens", type=int, nargs="*", default=[131_072, 1_048_576], help="strong scaling, in all")
    parser.add_argument("--weak", type=int, nargs="*", default=[16_384, 131_072], help="weak scaling, a rank")
    parser.add_argument("--check-tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--operator", choices=schemes.OPERATORS, default="constant", help="what is timed (constant)")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--in-a-row", type=int, default=0, help="so many calls in a row too (of few tokens)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new measurement after so long")
    parser.add_argument("--fp32", action="store_true", help="check fp32 too, at the end")
    parser.add_argument("--lanes", type=int, nargs="*", default=[], help="measure these numbers of lanes as well")
    calls = ("forward", "forward + backward")
    parser.add_argument("--fla", nargs="*", default=calls, choices=calls, help="its backward takes minutes to tune")
    parser.add_argument(
        "--graphs", nargs="*", default=[], choices=("p2p", "symmetric"), help="measure CUDA graphs of the calls too"
    )
    both = ("p2p", "symmetric")
    parser.add_argument("--transports", nargs="+", default=both, choices=both, help="on GPUs")
    args = parser.parse_args(argv)
    if args.device is None:
        needs_gpu(parser, "--device cpu --tokens 8192 --weak 4096 --heads 4 --dim 64 runs on a CPU")
    with joined(args.device or "auto") as me:
        bench = Bench(me, args)
        verify(bench, torch.bfloat16, bench.set_up([64, 32, 16, 8, 4, 2]))
        me.print(f"{bench.report.checks} checks, {len(bench.report.red)} differences")
        save(bench)
        if not bench.report.red:
            for part in (hops, scaling):
                with bench.survive(part.__name__):
                    part(bench)
                dist.barrier()
        verify(bench, torch.bfloat16, bench.set_up([3, 5, 7]))
        if args.fp32:
            verify(bench, torch.float32, bench.groups)
        if me.first:
            save(bench)
            with bench.survive("the plot"):
                draw(bench.report, args.out.with_suffix(".png"))
            print(show(bench.report, args.heads, args.dim), flush=True)
        return 1 if bench.report.red or bench.report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
