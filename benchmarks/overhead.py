"""What sharding costs beside communication: the total work of P virtual ranks over one sequence, against one call.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

On a GPU the work is the time in which any kernel or copy runs (torch.profiler), because P threads of one Python program
launch slower than one GPU computes; kernels of several ranks that run at once share the GPU, and count once. The
file has the sum of each kernel's own times. On the CPU the work is the processor time of all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scaling_report import provenance

import leetdist
from leetdist.sequence.grid import default_tile
from leetdist.testing.equality import lightning_slopes


def work(call: Callable[[], Any], cuda: bool, repeat: int) -> tuple[float, dict[str, float]]:
    """Seconds of work in one call, median, and of each kernel in the last."""
    call()
    spans, kernels = [], Counter[str]()
    for _ in range(repeat):
        if not cuda:
            begin = time.process_time()
            call()
            spans.append(time.process_time() - begin)
            continue
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy, until, kernels = 0.0, 0.0, Counter()
        for begin, end, name in sorted((e.time_range.start, e.time_range.end, e.name) for e in events):
            kernels[name[:60]] += (end - begin) / 1e6
            busy += max(0.0, end - max(begin, until))
            until = max(until, end)
        spans.append(busy / 1e6)
    return statistics.median(spans), dict(kernels.most_common(12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=131_072 if cuda else 16_384)
    parser.add_argument("--heads", type=int, default=32 if cuda else 4)
    parser.add_argument("--dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

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
        **provenance(), "torch": torch.__version__,
        "tokens": args.tokens, "heads": args.heads, "dim": args.dim, "rows": [],
    }  # fmt: skip
    for name, call in {"forward": forward, "forward + backward": both}.items():
        single, alone = work(lambda call=call: call(None), cuda, args.repeat)
        for ranks in args.ranks:
            total, kernels = work(lambda call=call, ranks=ranks: leetdist.virtual_ranks(call, ranks), cuda, args.repeat)
            times = {"single_s": single, "ranks_s": total, "single_kernels_s": alone, "ranks_kernels_s": kernels}
            results["rows"].append({"call": name, "ranks": ranks, **times})
            print(f"{name}, {ranks} ranks: {total * 1e3:.3f} ms, one {single * 1e3:.3f} ms, x {total / single:.3f}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
