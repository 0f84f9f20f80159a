"""What a sharded call costs the host, in steady state, apart from arithmetic: planning, and whole calls.

    python benchmarks/host.py --out benchmarks/results/scaling/host_cpu.json   # a neighbour that answers at once
    torchrun --nproc-per-node=2 benchmarks/host.py                            # the ranks' own transport

On a CPU the kernels compute nothing (benchmarks/common/idle.py), and what is timed is the host's part alone, without
any driver's. On GPUs the kernels are the real ones, of few tokens, and the host's part is timed from a synchronisation
on, while its launches still find room in the GPU's queue.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common.idle import Echo, idle_kernels, rehearsed
from suites.scaling.report import provenance

import leetdist
from leetdist.engine.planning import plan_call
from leetdist.launch.runtime import joined
from leetdist.sequence.group import resolve
from leetdist.sequence.inboxes import SLOTS
from leetdist.testing.equality import lightning_slopes

IN_A_ROW = 20


def timed(call: Callable[[], Any], repeat: int, *, together: bool) -> dict[str, float]:
    """Microseconds of a call, of IN_A_ROW in a row: the median row, and the least."""
    for _ in range(2 * SLOTS + 2):  # symmetric memory's slots come in turns, and each is recorded
        call()
    spans = []
    for _ in range(repeat):
        if together:
            dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(IN_A_ROW):
            call()
        spans.append((time.perf_counter() - begin) / IN_A_ROW * 1e6)
    return {"median_us": round(statistics.median(spans), 1), "least_us": round(min(spans), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="a rank's")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=20, help="rows of calls")
    parser.add_argument("--compiled", action="store_true", help="calls through torch.compile too")
    parser.add_argument("--transport", help="of torchrun's ranks: auto, p2p or symmetric")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    together = "RANK" in os.environ
    cuda = torch.cuda.is_available() and together
    with ExitStack() as stack:
        if together:
            stack.enter_context(joined())
        if not cuda:
            stack.enter_context(idle_kernels())
        group = resolve(dist.group.WORLD, args.transport) if together else Echo()
        assert group is not None
        device = torch.device("cuda" if cuda else "cpu")
        rows = list(measure(args, group, device, repeated=cuda))
        if not together:  # what the host does to repeat launches can be rehearsed without a GPU
            with rehearsed():
                rows += measure(args, Echo(), device, repeated=True)
        result = {
            "machine": torch.cuda.get_device_name() if cuda else "CPU, kernels that compute nothing",
            "ranks": group.size, "transport": group.kind, **provenance(), "torch": torch.__version__,
            "tokens a rank": args.tokens, "heads": args.heads, "dim": args.dim, "rows": rows,
        }  # fmt: skip
        if args.out is not None and (group.rank == 0 or not together):
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(args: argparse.Namespace, group: Any, device: torch.device, *, repeated: bool) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, args.heads, args.tokens, args.dim)
    q, k, v, do = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    slopes = lightning_slopes(args.heads).to(device)
    learnt = slopes.clone().requires_grad_()
    lengths = [args.tokens] * group.size
    options: dict[str, Any] = {
        "scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "method": "block",
        "tile": args.tokens, "precision": None,
    }  # fmt: skip

    def planned(forget: bool = False) -> None:
        if forget:
            group.agreements.clear()
            group.plans.clear()
        plan_call(q, k, v, slopes, transport=group, **options)

    def operator(*x: torch.Tensor, given: Any) -> torch.Tensor:
        return leetdist.linear_attention(*x, group=given, method="block", tile=args.tokens)

    def forward(given: Any, operator: Any = operator) -> torch.Tensor:
        with torch.no_grad():
            return operator(q, k, v, slopes, given=given)

    def both(given: Any, decay: torch.Tensor = slopes, operator: Any = operator) -> Any:
        o = operator(*leaves, decay, given=given)
        return torch.autograd.grad(o, [*leaves, decay] if decay.requires_grad else leaves, do)

    def in_one_thread(given: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(False):  # on a CPU there is but one
            return both(given)

    tokens_first = (1, args.tokens, args.heads, args.dim)
    x, z, dy = (torch.randn(tokens_first, device=device, dtype=dtype) for _ in range(3))
    B, C = (torch.randn(1, args.tokens, 1, args.dim, device=device, dtype=dtype) for _ in range(2))
    dt, (A, D, bias) = torch.rand(1, args.tokens, args.heads, device=device), -torch.rand(3, args.heads, device=device)
    plain = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    scans = {"scan": plain, "scan, D, z": plain | {"D": D, "z": z, "dt_bias": bias}}

    def scan(given: dict[str, torch.Tensor]) -> torch.Tensor:
        found = leetdist.mamba_chunk_scan_combined(**given, dt_softplus="dt_bias" in given, tile=args.tokens // 4)
        assert isinstance(found, torch.Tensor)
        return found

    def scan_forward(given: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return scan(given)

    def scan_both(given: dict[str, torch.Tensor]) -> Any:
        learnt = {name: y.detach().requires_grad_() for name, y in given.items()}
        return torch.autograd.grad(scan(learnt), list(learnt.values()), dy)

    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("plan, the first time", "group", lambda: planned(forget=True)),
        ("plan", "group", planned),
        ("plan", "declared", planned),
        *(("forward", who, lambda given=given: forward(given)) for who, given in whom(group)),
        *(("forward + backward", who, lambda given=given: both(given)) for who, given in whom(group)),
        *(("the same, in one thread", who, lambda given=given: in_one_thread(given)) for who, given in whom(group)),
        *(("forward + backward, learnt", who, lambda given=given: both(given, learnt)) for who, given in whom(group)),
    ]
    if repeated or device.type == "cuda":  # on a CPU a scan that is not repeated has steps that compute
        for name, given in scans.items():
            calls += [
                (f"{name}: forward", "one device", lambda given=given: scan_forward(given)),
                (f"{name}: forward + backward", "one device", lambda given=given: scan_both(given)),
            ]
    if args.compiled:
        compiled = torch.compile(operator, dynamic=False)
        for who, given in whom(group):
            if given is None or group.kind != Echo.kind:  # a graph knows a group by name, and nobody else knows Echo's
                calls += [
                    ("forward, compiled", who, lambda given=given: forward(given, compiled)),
                    ("forward + backward, compiled", who, lambda given=given: both(given, operator=compiled)),
                ]
    for what, who, call in calls:
        with ExitStack() as stack:
            if who == "declared":
                stack.enter_context(leetdist.sequence_parallel(group, lengths=lengths))
            times = timed(call, args.repeat, together=group.kind != Echo.kind)
        row = {"what": what, "who": who, "launches": "repeated" if repeated else "not repeated", **times}
        if group.rank == 0 or group.kind == Echo.kind:
            name = f"{what:28} {who:10} {row['launches']:12}"
            print(f"{name} {row['median_us']:8.1f} {row['least_us']:8.1f} us", flush=True)
        yield row


def whom(group: Any) -> list[tuple[str, Any]]:
    return [("one device", None), ("group", group), ("declared", group)]


if __name__ == "__main__":
    main()
