"""Where results go unless somebody says, and on which machine."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

RUNS = Path(__file__).resolve().parents[2] / "runs" / "benchmarks"  # not what is committed: that is renewed by --out


def needs_gpu(parser: argparse.ArgumentParser, otherwise: str | None = None) -> None:
    """Ends the program in words where there is no GPU, before it computes for hours; otherwise: what runs here."""
    if not torch.cuda.is_available():
        hint = f"; {otherwise}" if otherwise else ""
        parser.exit(1, f"{parser.prog}: these sizes are a GPU's, and torch {torch.__version__} sees none here{hint}\n")


__all__ = ["RUNS", "needs_gpu"]
