"""Kill, stop and confuse a rank at each stage of a job: when does the last survivor's call end, and whom do they name?

    python tests/sequence/faults.py            writes tests/sequence/faults.json, with the time and words of every fault

Outside CI: some minutes on two cores. Every survivor has to end within the timeout plus 5 s (5 s and 10 s here) and
name the rank at fault; exit code 1 where one does not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import leetdist
from leetdist.engine import scan
from leetdist.operators.constant_decay import ConstantDecay
from leetdist.sequence import memory, p2p

RANKS, TIMEOUT, GRACE = 3, 5.0, 5.0
JOBS = 3  # at once: they mostly wait
# Stage -> the object and the function that is about to run on the victim; None: between two calls.
STAGES: dict[str, tuple[Any, str] | None] = {
    "set-up": (memory, "shared"),
    "agreement": (p2p.PointToPoint, "alike"),
    "forward scan": (p2p.PointToPoint, "receive_state"),
    "forward outputs": (ConstantDecay, "outputs"),
    "exchange of final states": (scan, "states_to_all"),
    "backward scan": (ConstantDecay, "fold"),
    "idle": None,
}


def end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "raises and lives":
        raise MemoryError("planted")
    if how == "leaves":  # in good order, as if it were done
        dist.destroy_process_group()
        os._exit(0)


def call(group: Any, between: Callable[[], None] = lambda: None) -> None:
    q, k, v = (torch.randn(1, 2, 192, 16, requires_grad=True) for _ in range(3))
    with leetdist.sequence_parallel(group):
        o, state = leetdist.linear_attention(q, k, v, return_state=True, method="block", tile=64)
        between()
        (o.sum() + state.sum()).backward()


def rank_of(rank: int, store: str, victim: int, stage: str, how: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{store}", rank=rank, world_size=RANKS)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    dist.barrier()  # PyTorch's own set-up has its own ways of failing

    def plant() -> None:
        if rank != victim:
            return
        (out / "begun").write_text(str(time.time()))
        place = STAGES[stage]
        if place is None:
            end(how)
            return
        owner, name = place
        real = getattr(owner, name)

        def acting(*args: Any, **kwargs: Any) -> Any:
            setattr(owner, name, real)
            end(how)
            return real(*args, **kwargs)

        setattr(owner, name, acting)

    said = ""
    try:
        if stage != "set-up":
            call(group)
        if stage == "backward scan":
            call(group, plant)
        else:
            plant()
            call(group)
        call(group)
    except (RuntimeError, MemoryError) as error:
        said = f"{type(error).__name__}: {error}"
    (out / f"said-{rank}").write_text(f"{time.time()} {said}")
    if rank == victim and how == "raises and lives":
        time.sleep(TIMEOUT + GRACE)
    dist.destroy_process_group()


def fault(victim: int, stage: str, how: str) -> dict[str, Any]:
    """One job with one fault: what every survivor said, and how long after the fault its process ended."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        port = str(free_port())
        arguments = [[str(rank), port, str(victim), stage, how, folder] for rank in range(RANKS)]
        processes = [
            subprocess.Popen([sys.executable, __file__, "--rank", *each], stderr=subprocess.DEVNULL)
            for each in arguments
        ]
        survivors, ended = [rank for rank in range(RANKS) if rank != victim], {}
        deadline = time.time() + 200
        while len(ended) < len(survivors) and time.time() < deadline:
            for rank in survivors:
                if rank not in ended and processes[rank].poll() is not None:
                    ended[rank] = time.time()
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.wait()
        begun = float((out / "begun").read_text())
        found = []
        for rank in survivors:
            path = out / f"said-{rank}"
            when, _, said = path.read_text().partition(" ") if path.exists() else ("", "", "")
            found.append(
                {
                    "rank": rank,
                    "seconds": round(float(when) - begun, 1) if when else math.inf,
                    "process ended": round(ended[rank] - begun, 1) if rank in ended else None,
                    "said": said.split(" Backend:")[0],
                }
            )
    named = all(each["said"] and f"rank {victim} of {RANKS} does not answer" in each["said"] for each in found)
    in_time = all(each["seconds"] <= TIMEOUT + GRACE and each["process ended"] for each in found)
    return {"victim": victim, "stage": stage, "how": how, "in time": in_time, "named": named, "survivors": found}


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def main() -> int:
    table = [
        (victim, stage, how)
        for how in ("killed", "stopped", "raises and lives", "leaves")
        for stage in STAGES
        for victim in (0, 1)
    ]
    faults = []
    with ThreadPoolExecutor(JOBS) as pool:
        for one in pool.map(fault, *zip(*table, strict=True)):
            faults.append(one)
            last = max(each["seconds"] for each in one["survivors"])
            verdict = "" if one["in time"] and one["named"] else "   <- wrong"
            print(f"rank {one['victim']} {one['how']:<17} {one['stage']:<25} {last:4.1f} s{verdict}", flush=True)
    about = {
        "command": "python tests/sequence/faults.py", "torch": torch.__version__, "python": platform.python_version(),
        "ranks": RANKS, "timeout": TIMEOUT, "bound": TIMEOUT + GRACE,
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps({**about, "faults": faults}, indent=1) + "\n")
    return int(not all(one["in time"] and one["named"] for one in faults))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        number, store_port, who, at, what, where = sys.argv[2:]
        torch.set_num_threads(1)
        rank_of(int(number), store_port, int(who), at, what, Path(where))
    else:
        sys.exit(main())
