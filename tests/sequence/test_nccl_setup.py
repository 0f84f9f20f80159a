"""How a group comes to NCCL's own calls: on which GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import run_ranks, values
from leetdist.sequence import p2p
from leetdist.sequence.p2p import PointToPoint


def bound(rank: int) -> list[Any]:
    """The group's GPU is that of init_process_group's device_id, whatever the current one is."""
    group = dist.group.WORLD
    transport = PointToPoint(group)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)
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
    group.bound_device_id = None
    return [str(x) for x in seen]


def test_the_gpu_is_the_one_that_the_group_is_bound_to() -> None:
    assert values(run_ranks(bound, 2)) == [["cuda:0", "cuda:1", "cuda:1"]] * 2
