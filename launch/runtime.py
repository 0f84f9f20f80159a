"""What every launched script needs first: this rank's device, its group, and who prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from leetdist.engine.checks import wanted_lanes
from leetdist.engine.values import checks_values
from leetdist.integrations.checkpoint import CheckpointError
from leetdist.kernels.runtime.settings import settings
from leetdist.launch.commands import after_the_first, in_words
from leetdist.sequence.group import resolve
from leetdist.sequence.symmetric import wanted_transport
from leetdist.sequence.transport import timeout_seconds


@contextmanager
def one_message() -> Iterator[None]:
    """Wrong paths and arguments end the program in words, from one rank of a host, without a traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError, CheckpointError) as error:
        after_the_first()
        raise SystemExit(in_words(error)) from error
    except SystemExit as error:
        if isinstance(error.code, str):
            after_the_first()
        raise


def check_environment() -> None:
    """ValueError where a variable of leetdist's has no value that it may have: before anything is begun."""
    settings()
    timeout_seconds()
    wanted_lanes()
    checks_values()
    wanted_transport()


@dataclass(frozen=True)
class Rank:
    """This process in its job."""

    rank: int
    size: int
    device: torch.device
    backend: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    def print(self, text: str = "") -> None:
        if self.first:
            print(text, flush=True)

    def gather(self, mine: Any, what: str) -> list[Any]:
        """Every rank's plain value, on every rank."""
        dist.barrier()  # for as long as the job allows, which may be longer than a call does
        transport = resolve(dist.group.WORLD)
        assert transport is not None
        with transport.call("exchange"):
            return transport.gather_objects(mine, what)


def choose_device(wanted: str) -> torch.device:
    """ "auto" takes a GPU where there is one, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {wanted}: this machine has no GPU that torch {torch.__version__} can use")
    chosen = torch.device(wanted)
    if (chosen.index or 0) >= max(1, torch.cuda.device_count()):
        raise SystemExit(f"--device {wanted}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0 on")
    return chosen


@contextmanager
def joined(device: str = "auto", timeout_s: float = 300.0) -> Iterator[Rank]:
    """The process group that torchrun set up (a group of one without torchrun), left in good order at the end.

    NCCL with one GPU a rank; gloo on the CPU, and where ranks share a GPU, which NCCL refuses.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    with one_message():
        chosen = choose_device(device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = "gloo"
    if chosen.type == "cuda":
        gpus = torch.cuda.device_count()
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
        torch.cuda.set_device(chosen)
        if ranks_here <= gpus:
            backend = "nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    failed = True
    try:
        yield Rank(dist.get_rank(), dist.get_world_size(), chosen, backend)
        failed = False
    finally:
        # A rank that leaves while others still talk to it makes them fail; one that failed must not wait for them.
        if not failed:
            dist.barrier()
        dist.destroy_process_group()
