"""A run over several GPUs: a process each, which takes the next pass that none has taken; their results become one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.measure import Result


def take(place: Path, number: int) -> bool:
    """Whether this process has the pass; one that is taken is another's."""
    try:
        (place / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def spread(gpus: int, place: Path, options: list[str]) -> int:
    """The script of this process once more on each GPU, with more options; how many have failed."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    numbers = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    command = [sys.executable, *sys.argv, *options, "--taking", str(place)]
    processes = [
        subprocess.Popen([*command, "--out", str(place / f"of{gpu}")], env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu})
        for gpu in numbers
    ]
    return sum(process.wait() != 0 for process in processes)


def joined(place: Path, name: str, order: list[tuple[str, str, str]]) -> tuple[list[Result], dict[str, Any]]:
    """Results of all processes in the order of (suite, case, pass), and the machine with each GPU's copies."""
    parts = [json.loads(path.read_text()) for path in sorted(place.glob(f"of*/{name}.json"))]
    results = [Result(**result) for part in parts for result in part["results"]]
    results.sort(key=lambda result: order.index((result.suite, result.case, result.which)))
    machines = [part["machine"] for part in parts]
    copies = {f"copy_bytes_per_second_{n}": x["copy_bytes_per_second"] for n, x in enumerate(machines[1:], 2)}
    return results, {**machines[0], **copies} if machines else {}
