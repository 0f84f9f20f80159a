"""What a result was made from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this tree; LEETDIST_COMMIT says it of a tree that travelled without its history."""
    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return os.environ.get("LEETDIST_COMMIT") or git.stdout.strip() or "unknown"
