"""What benchmarks/training.py passes on to each rank, and how the first of them answers."""

from __future__ import annotations

import argparse

ROW = "ROW "  # before each row, as JSON
WAYS = ("eager", "compiled")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072], help="in a sequence, over all ranks")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager"])
    parser.add_argument("--layer", type=int, nargs="*", default=[], help="a layer by itself, of so many tokens a rank")
    parser.add_argument("--model", default="100m")
    parser.add_argument("--steps", type=int, default=24)
    # Launches of a layer are repeated from the third time on that it has the same one of four places of messages.
    parser.add_argument("--skip", type=int, default=14, help="steps not counted: in them launches are recorded (14)")
    parser.add_argument("--repeat", type=int, default=5, help="rows of calls of a layer")
    parser.add_argument("--profile", action="store_true", help="trace one more step, and say where its time went")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds for one launcher, then nothing new is begun"
    )
    return parser
