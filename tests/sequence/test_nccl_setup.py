"""How a group comes to NCCL's own calls: on which GPU, by a communicator that may not block, and where it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import run_ranks, values
from leetdist.sequence import blame, direct, nccl, p2p
from leetdist.sequence import group as groups
from leetdist.sequence.nccl import Communicator, Library
from leetdist.sequence.p2p import PointToPoint
from nccl_standin import HANDLE, Symbols, by_gloo, nccl_by_gloo


def test_one_that_does_not_block_is_waited_for() -> None:
    """With NCCL_COMM_BLOCKING=0 calls come back before what they give a stream is there."""
    symbols = Symbols()
    symbols.results = {"CommInitRank": nccl.IN_PROGRESS, "Send": nccl.IN_PROGRESS, "GroupEnd": nccl.IN_PROGRESS}
    states: list[int] = []

    def state(handle: Any, found: Any) -> int:
        found._obj.value = states.pop(0)
        return 0

    library = Library(symbols)
    library.get_error = state
    states[:] = [7, 7, 0]

    def begin(handle: Any, *_: Any) -> int:
        handle._obj.value = HANDLE
        return nccl.IN_PROGRESS

    library.begin = begin
    made = Communicator(library, library.identity(), 0, 2)
    assert states == []
    states[:] = [7, 0]
    made.sender(4, 1)(0, 8)
    assert states == []
    states[:] = [7, 0]
    with made.together():
        pass
    assert states == []
    states[:] = [7, 5]
    with pytest.raises(RuntimeError, match="NCCL: error 5"):
        made.sender(4, 1)(0, 8)
    assert "CommAbort" not in symbols.names()
    states[:] = [7, 3]
    with pytest.raises(RuntimeError, match="NCCL: error 3"):  # in its own thread
        Communicator(library, library.identity(), 0, 2)
    assert symbols.names().count("CommAbort") == 1
    states[:] = [7] * 1000
    with pytest.raises(nccl.Late, match=r"still in progress after 0\.0 s"):
        Communicator(library, library.identity(), 0, 2, 0.01)
    assert symbols.names().count("CommAbort") == 2
    states[:] = [7] * 1000
    library.get_error = lambda handle, found: made.abort() or state(handle, found)
    with pytest.raises(RuntimeError, match="NCCL: the communicator has ended"):
        made.sender(4, 1)(0, 8)


def bound(rank: int) -> list[Any]:
    """The group's GPU is that of init_process_group's device_id, which its first use makes the current one."""
    group = dist.group.WORLD
    transport = PointToPoint(group)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "set_device", lambda device: seen.append(f"made current: {device}"))
        patch.setattr(p2p, "connect", lambda transport, device: seen.append(device))
        transport.staged = False
        transport.take_nccl()
        group.bound_device_id = torch.device("cuda", 1)
        transport.take_nccl()
        patch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
        patch.setattr(dist, "all_reduce", lambda x, group: seen.append(x))
        patch.setattr(torch, "zeros", lambda *shape, device: device)
        patch.setattr(PointToPoint, "_share_memory", lambda transport: None)
        PointToPoint(group)
        group.bound_device_id = torch.device("cuda", 0)  # and is already
        PointToPoint(group)
    group.bound_device_id = None
    return [str(x) for x in seen]


def test_the_gpu_is_the_one_that_the_group_is_bound_to() -> None:
    assert values(run_ranks(bound, 2)) == [["cuda:0", "cuda:1", "made current: cuda:1", "cuda:1", "cuda:0"]] * 2


def gives_up(rank: int) -> Any:
    """The greeting fails: the error is told, and nothing is left that would end the process, or wait."""
    blame.ROLL_CALL_SECONDS = 0.5
    closed: list[Any] = []

    class Connected(PointToPoint):
        def take_nccl(self) -> None:
            symbols.results = {"GroupEnd": 6} if rank == 0 else {}
            with nccl_by_gloo(self, symbols):
                pass

        def close(self) -> None:
            closed.append(self)
            super().close()

    symbols = Symbols(by_gloo if rank == 0 else None)
    with pytest.MonkeyPatch.context() as patch:
        made: list[Any] = []
        patch.setattr(groups, "PointToPoint", Connected)
        patch.setattr(direct.Watch, "stop", lambda watch: made.append("stopped") or setattr(watch, "stopped", True))
        if rank == 1:
            groups.resolve(dist.group.WORLD)
            return []
        with pytest.raises(RuntimeError, match="NCCL: error 6"):
            groups.resolve(dist.group.WORLD)
    assert len(closed) == 1
    assert closed[0].failure is not None
    return [*made, symbols.names()[-1]]


def test_set_up_that_fails_leaves_nothing() -> None:
    told, _ = values(run_ranks(gives_up, 2))
    assert "stopped" in told
    assert told[-1] == "CommAbort"
