"""`python -m leetdist.launch NAME ...`, also under torchrun (`-m leetdist.launch NAME`): calls that module's `main`."""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "verify": "is the operator on these ranks equal to one device, bit for bit?",
    "plan": "what will a sharded call cost on P ranks: time, bytes, memory; with a plot",
    "doctor": "what has this machine, what will run on it, and what to install for the faster",
    "train": "train on long sharded sequences, under torchrun, accelerate or deepspeed",
    "generate": "continue a text: prompt over all ranks, then token by token",
    "demo": "train and run a small language model over one long sharded text",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("\n".join(["usage: python -m leetdist.launch COMMAND [--help]", *lines]))
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    result: int = importlib.import_module(f"leetdist.launch.{argv[0]}").main(argv[1:])
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
