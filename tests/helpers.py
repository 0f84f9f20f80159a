"""Real processes for tests: run a function on P gloo ranks and look at what each returned or raised."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import secrets
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from leetdist.kernels.common.tiles import Tiles


@dataclass
class Outcome:
    """How one rank ended: with a value, with an error's text, or with neither (it was killed)."""

    value: Any = None
    error: str | None = None
    ended: bool = False


def free_port() -> int:
    """Below the range that connections get theirs from: until its user comes, no other process of a test takes it."""
    while True:
        port = secrets.choice(range(20_000, 30_000))
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


# Ranks start as forks of a server that has imported these: three seconds once, instead of in every process, and ten for
# ranks that train.
BASE = ("leetdist.testing.equality", "leetdist.sequence.symmetric", "torch.distributed.device_mesh")
FRAMEWORKS = (
    *BASE,
    "accelerate",
    "deepspeed",
    "leetdist.integrations.transformers",
    "leetdist.launch.model",
    "tensorboard",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
)
_imported: tuple[str, ...] = ()


def serve(modules: tuple[str, ...]) -> None:
    """The next ranks are forks of a process that has imported these modules, and maybe others."""
    global _imported
    if not set(modules) <= set(_imported):
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # it would go on with what it has imported
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
        _imported = modules


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout_s: float = 60.0,
    backend: str = "gloo",
    frameworks: bool = False,
    start_method: str = "forkserver",
) -> list[Outcome]:
    """Call `function(rank, *args)` on `ranks` processes with a process group; their outcomes, in rank order.

    start_method: "spawn" for a test that reads what they print, which a server prints where it was started.
    """
    if frameworks:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read where it is imported
    serve(FRAMEWORKS if frameworks else BASE)
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _main,
            (function, ranks, free_port(), folder, timeout_s, backend, args, sys.path, dict(os.environ)),
            nprocs=ranks,
            join=False,
            start_method=start_method,
        )
        for process in processes.processes:
            process.join(timeout_s + 60)
            if process.is_alive():
                process.kill()
        outcomes = []
        for rank in range(ranks):
            path = Path(folder, str(rank))
            outcomes.append(pickle.loads(path.read_bytes()) if path.exists() else Outcome())
        return outcomes


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks returned; the first error of any rank fails the test."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
        assert outcome.ended, f"rank {rank} was killed"
    return [outcome.value for outcome in outcomes]


def _main(
    rank: int,
    function: Callable[..., Any],
    ranks: int,
    port: int,
    folder: str,
    timeout_s: float,
    backend: str,
    args: tuple[Any, ...],
    path: list[str],
    environment: dict[str, str],
) -> None:
    sys.path[:] = path
    os.environ.clear()  # it was the server's
    os.environ.update(environment)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    dist.init_process_group(backend, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s))
    outcome = Outcome(ended=True)
    try:
        outcome.value = function(rank, *args)
    except Exception:
        outcome.error = traceback.format_exc()
    Path(folder, str(rank)).write_bytes(pickle.dumps(outcome))
    if outcome.error is None:
        dist.barrier()
        dist.destroy_process_group()


def assert_leaves_out_the_last(
    kernels: Any,
    b: torch.Tensor,
    c: torch.Tensor,
    log_decay: torch.Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    **options: Any,
) -> None:
    """`tile_states(to_end=False)` and `fold(to_end=False)` neither read the tile that the walk ends with nor change a
    bit of what the others add, or of any tile's start."""
    if not tiles.regular:
        return
    last = 0 if reverse else tiles.count - 1
    others = [tile for tile in range(tiles.count) if tile != last]
    whole = kernels.tile_states(b, c, log_decay, tiles, reverse=reverse, **options)
    begin, length = tiles.spans[last]
    b = b.clone()
    b[:, :, begin : begin + length] = math.nan
    states = torch.zeros_like(whole)
    kernels.tile_states(b, c, log_decay, tiles, reverse=reverse, to_end=False, out=states, **options)
    assert not states.isnan().any()
    assert torch.equal(states[:, :, others], whole[:, :, others])
    states[:, :, last] = math.nan
    kernels.fold(whole, None, log_decay, tiles, reverse=reverse)
    kernels.fold(states, None, log_decay, tiles, reverse=reverse, to_end=False)
    assert torch.equal(states, whole)


def forget_kernels() -> None:
    """Let go of what is remembered of who computes a kind of call."""
    from leetdist.engine import planning
    from leetdist.operators import composition, dispatch, methods

    for known in (methods._kernels_for, composition._composed, dispatch._backend_of, planning._local_plan):
        known.cache_clear()
    for table in (dispatch._failed, dispatch._works, dispatch._told, dispatch._decoders, planning._plans):
        table.clear()
