"""Processes of this machine for one command, by torchrun, without torchrun's account of how a rank ended."""

from __future__ import annotations

import logging
import os

import torch


def is_launched() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def usual_ranks(device: str) -> int:
    """With several GPUs one a rank; two that share one; four on a CPU."""
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    return gpus if gpus > 1 else 2 if gpus else 4


def start(ranks: int, argv: list[str]) -> int:
    """`python -m leetdist.launch ARGV` as that many ranks; the exit code of the first that failed, or 0. What is wrong
    is said by the rank that met it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        # Behind "--", or torchrun looks for its own options among ours.
        torchrun(["--standalone", "--nproc-per-node", str(ranks), "-m", "--", "leetdist.launch", *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:  # by a signal: it could not say anything
            print(f"leetdist: rank {failure.local_rank} was ended by signal {-failure.exitcode}")
        return failure.exitcode if failure.exitcode > 0 else 1
    except KeyboardInterrupt:
        return 130
    return 0


__all__ = ["is_launched", "start", "usual_ranks"]
