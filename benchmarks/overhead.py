"""What sharding costs beside communication: the total work of P virtual ranks over one sequence, against one call.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
    torchrun --nproc-per-node 4 benchmarks/overhead.py      # on the CPU: processes over gloo instead

On a GPU the work is the time that a CUDA graph of all ranks takes, each on a stream of its own, because P threads of
one Python program launch slower than one GPU computes; on the CPU it is the processor time of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scaling import captured
from suites.scaling.report import provenance

import leetdist
from leetdist.sequence.grid import default_tile
from leetdist.testing.equality import lightning_slopes


def work(call: Callable[[], Any], repeat: int) -> float:
    """Seconds of work in one call, median."""
    if torch.cuda.is_available():
        call = captured(call, mode="relaxed")  # other threads launch, too
    call()
    spans = []
    for _ in range(repeat):
        if not torch.cuda.is_available():
            begin = time.process_time()
            call()
            spans.append(time.process_time() - begin)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        spans.append(first.elapsed_time(last) / 1e3)
    return statistics.median(spans)


def at_once(call: Callable[[Any], Any], ranks: int) -> Callable[[], Any]:
    """`call` on so many virtual ranks, on a GPU each on its own stream."""
    if not torch.cuda.is_available():
        return lambda: leetdist.virtual_ranks(call, ranks)
    streams = [torch.cuda.Stream() for _ in range(ranks)]

    def rank(group: Any) -> Any:
        with torch.cuda.stream(streams[group.rank]):
            return call(group)

    def all_ranks() -> Any:
        main = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(main)
        results = leetdist.virtual_ranks(rank, ranks)
        for stream in streams:
            main.wait_stream(stream)
        return results

    return all_ranks


def in_all(call: Callable[[Any], Any], group: Any, repeat: int) -> float:
    """Processor time of one call in all processes together. Without a group each of them makes the whole call, at once,
    so that it shares caches and memory as the shards' calls do."""
    dist.barrier()
    mine = torch.tensor(work(lambda: call(group), repeat), dtype=torch.float64)
    dist.all_reduce(mine)
    return float(mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=131_072 if cuda else 16_384)
    parser.add_argument("--heads", type=int, default=32 if cuda else 4)
    parser.add_argument("--dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    processes = "RANK" in os.environ
    if processes:
        dist.init_process_group("gloo")
        args.ranks = [dist.get_world_size()]

    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    q, k, v, do = (
        torch.randn(1, args.tokens, args.heads, args.dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    decay, tile = lightning_slopes(args.heads).to(device), default_tile(args.tokens)

    def forward(group: Any) -> torch.Tensor:
        with torch.no_grad():
            shards = [leetdist.shard_sequence(x, 2, group) for x in (q, k, v)]
            return leetdist.linear_attention(*shards, decay, group=group, tile=tile)

    def both(group: Any) -> tuple[torch.Tensor, ...]:
        leaves = [leetdist.shard_sequence(x, 2, group).detach().requires_grad_() for x in (q, k, v)]
        o = leetdist.linear_attention(*leaves, decay, group=group, tile=tile)
        return torch.autograd.grad(o, leaves, leetdist.shard_sequence(do, 2, group))

    results: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "ranks are": "processes over gloo" if processes else "virtual",
        **provenance(), "torch": torch.__version__,
        "tokens": args.tokens, "heads": args.heads, "dim": args.dim, "rows": [],
    }  # fmt: skip
    for name, call in {"forward": forward, "forward + backward": both}.items():
        if processes:
            single = in_all(call, None, args.repeat) / dist.get_world_size()
        else:
            single = work(lambda call=call: call(None), args.repeat)
        for ranks in args.ranks:
            if processes:
                total = in_all(call, dist.group.WORLD, args.repeat)
            else:
                total = work(at_once(call, ranks), args.repeat)
            if processes and dist.get_rank():
                continue
            results["rows"].append({"call": name, "ranks": ranks, "single_s": single, "ranks_s": total})
            print(f"{name}, {ranks} ranks: {total * 1e3:.3f} ms, one {single * 1e3:.3f} ms, x {total / single:.3f}")
    if args.out is not None and results["rows"]:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))
    if processes:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
