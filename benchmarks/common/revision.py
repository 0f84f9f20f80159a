"""What a result was made from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit(root: Path | None = None) -> str:
    """The commit of a tree, this one unless told; LEETDIST_COMMIT says it of this one where it travelled without its
    history."""
    here = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root or here, capture_output=True, text=True)
    return (None if root else os.environ.get("LEETDIST_COMMIT")) or git.stdout.strip() or "unknown"
