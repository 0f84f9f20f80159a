"""What it costs the hosts to agree, a call: the first, every later one, and with declared lengths.

    torchrun --nproc-per-node=2 benchmarks/agreement.py --out benchmarks/results/agreement.json

Times planning alone (`plan_call`: validation, agreement, plan), over gloo; no tensor moves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import leetdist
from leetdist.engine.plan import plan_call
from leetdist.launch.runtime import joined
from leetdist.sequence.group import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeat", type=int, default=500)
    args = parser.parse_args()
    with joined("cpu") as me:
        transport = resolve(dist.group.WORLD)
        assert transport is not None
        q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
        log_decay = torch.tensor([-0.1, -0.2])
        options: dict[str, Any] = {
            "scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "method": "auto",
            "tile": None,
        }  # fmt: skip

        def median(*, forget: bool = False, group: Any = transport) -> float:
            spans = []
            for _ in range(args.repeat):
                if forget:
                    transport.agreements.clear()
                dist.barrier()
                begin = time.perf_counter()
                plan_call(q, k, v, log_decay, transport=group, **options)
                transport.flush()
                spans.append(time.perf_counter() - begin)
            return statistics.median(spans) * 1e6

        result = {
            "ranks": me.size,
            "alone_us": median(group=None),
            "first_us": median(forget=True),
            "later_us": median(),
        }
        with leetdist.sequence_parallel(dist.group.WORLD, lengths=[64] * me.size):
            result["declared_us"] = median()
        me.print(json.dumps(result))
        if me.first and args.out is not None:
            known = json.loads(args.out.read_text()) if args.out.exists() else []
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps([*(row for row in known if row["ranks"] != me.size), result], indent=1))


if __name__ == "__main__":
    main()
