"""NCCL's own calls between two GPUs: bits of one GPU, repeated, exchanged, in a graph; and who is named."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import leetdist
from helpers import Outcome, run_ranks, values
from leetdist.sequence.group import resolve
from leetdist.sequence.p2p import PointToPoint
from leetdist.testing.equality import Case, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.real_empty,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CASES = [
    Case(2048, 64, 64, heads=8, kv_heads=4, dtype=torch.bfloat16, decay="mixed", uneven=True, initial=True),
    Case(2500, 64, 64, heads=8, dtype=torch.bfloat16, documents=(0, 1, 850, 1024, 2500)),
]
CASES = [replace(case, learnt=False) for case in CASES]
CALLS = 10


def over_nccl(rank: int, group: Any = None) -> PointToPoint:
    torch.cuda.set_device(rank)
    transport = resolve(dist.group.WORLD if group is None else group, "p2p")
    assert isinstance(transport, PointToPoint)
    assert transport.direct is not None
    return transport


def call(whole: list[Tensor], group: PointToPoint | None) -> list[Tensor]:
    q, k, v, do = (leetdist.shard_sequence(x, 2, group, tile=128) for x in whole)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    decay = torch.tensor([-0.001, -0.01, -0.1, 0.0], device=q.device)
    o = leetdist.linear_attention(*leaves, decay, group=group, tile=128)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, 1024, 64, generator=generator).to("cuda", torch.bfloat16) for _ in range(4)]


def same(ours: list[Tensor], whole: list[Tensor], transport: PointToPoint) -> bool:
    expected = [leetdist.shard_sequence(x, 2, transport, tile=128) for x in call(whole, None)]
    return all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def repeated(transport: PointToPoint) -> tuple[list[bool], int]:
    """Calls in a row, and in how many kinds of passes NCCL's calls are repeated."""
    from leetdist.kernels.runtime import replay
    from leetdist.kernels.runtime.repeated_launch import LibraryStep

    equal = [same(call(whole, transport), whole, transport) for whole in map(inputs, range(CALLS))]
    known = [found for kind, found in replay._kinds.items() if kind[1] is not None and found is not None]
    return equal, sum(any(isinstance(action, LibraryStep) for action in found.actions) for found in known)


def captured(transport: PointToPoint) -> list[bool]:
    """A call as a CUDA graph, replayed with other inputs."""
    whole = [inputs(seed) for seed in (20, 21)]
    mine = [leetdist.shard_sequence(x, 2, transport, tile=128).clone() for x in whole[0]]
    leaves = [x.requires_grad_() for x in mine[:3]]
    decay = torch.tensor([-0.001, -0.01, -0.1, 0.0], device="cuda")

    def step() -> list[Tensor]:
        o = leetdist.linear_attention(*leaves, decay, group=transport, tile=128)
        return [o.detach(), *torch.autograd.grad(o, leaves, mine[3])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        ours = step()
    equal = []
    for given in (whole[0], whole[1], whole[0]):
        with torch.no_grad():
            for x, y in zip(mine, given, strict=True):
                x.copy_(leetdist.shard_sequence(y, 2, transport, tile=128))
        graph.replay()
        equal.append(same(ours, given, transport))
    return equal


def exchanged(transport: PointToPoint) -> list[bool]:
    """8 MiB each way at once, and to and from parts of tensors: more than NCCL keeps on the way."""
    other = 1 - transport.rank
    equal = []
    for seed in range(3):
        both = [torch.randn(2048, 1024, generator=torch.Generator().manual_seed(10 * seed + n)).cuda() for n in (0, 1)]
        out = torch.full((2048, 2048), torch.nan, device="cuda")
        with transport.call("exchange"):
            transport.exchange([(both[transport.rank], other)], [(out[:, ::2], other)], "two at once")
            transport.flush()
        equal.append(torch.equal(out[:, ::2], both[other]) and bool(out[:, 1::2].isnan().all()))
    return equal


def all_of_it(rank: int) -> dict[str, Any]:
    free = torch.cuda.mem_get_info(rank)[0]
    transport = over_nccl(rank)
    found: dict[str, Any] = {"MiB": (free - torch.cuda.mem_get_info(rank)[0]) >> 20}
    found["repeated"] = repeated(transport)
    found["exchanged"] = exchanged(transport)
    device = torch.device("cuda", rank)
    found["differs"] = []
    for lanes in ("1", "2"):
        os.environ["LEETDIST_LANES"] = lanes
        for seed, case in enumerate(CASES):
            found["differs"] += [f"{lanes} lanes, {case}: {d}" for d in check(case, transport, device, seed)]
    found["pending"] = len(transport.pending)
    found["captured"] = captured(transport)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    results = values(run_ranks(all_of_it, 2, backend="nccl", timeout_s=200))
    print(f"GPU memory taken by the groups, MiB: {[result['MiB'] for result in results]}")
    return results


def test_repeated_calls_are_equal(found: list[dict[str, Any]]) -> None:
    for result in found:
        equal, kinds = result["repeated"]
        assert equal == [True] * CALLS
        assert kinds == 2  # forward and backward


@pytest.mark.parametrize("what", ["exchanged", "captured"])
def test_exchanges_and_graphs_are_equal(found: list[dict[str, Any]], what: str) -> None:
    for result in found:
        assert result[what] == [True] * 3


def test_kinds_of_calls_are_equal(found: list[dict[str, Any]]) -> None:
    """Uneven shards, grouped heads, initial and final states, packed documents; nothing goes by the process group."""
    for result in found:
        assert result["differs"] == []
        assert result["pending"] == 0


def without_blocking(rank: int) -> list[bool]:
    """Calls of NCCL come back before what they give a stream is there."""
    os.environ |= {"NCCL_COMM_BLOCKING": "0", "TORCH_NCCL_USE_COMM_NONBLOCKING": "1"}
    transport = over_nccl(rank)
    return [*repeated(transport)[0], *exchanged(transport)]


def test_a_communicator_that_does_not_block() -> None:
    for equal in values(run_ranks(without_blocking, 2, backend="nccl", timeout_s=100)):
        assert equal == [True] * (CALLS + 3)


def left_alone(rank: int, timeout: float | None) -> None:
    """The last rank ends between the passes."""
    os.environ["LEETDIST_BACKEND"] = "torch"
    torch.cuda.set_device(rank)
    group = dist.new_group([0, 1], timeout=timedelta(seconds=10 if timeout is None else 100))
    transport = over_nccl(rank, group)
    x = torch.randn(1, 2, 128, 16, device="cuda", requires_grad=True)
    leetdist.linear_attention(x, x, x, tile=64, group=transport)
    with leetdist.sequence_parallel(transport, timeout=timeout):
        o = leetdist.linear_attention(x, x, x, tile=64)
        torch.cuda.synchronize()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while transport.processes[1].state() == "runs":
            time.sleep(0.1)
        begin = time.monotonic()
        try:
            o.sum().backward()
            torch.cuda.synchronize()
        except RuntimeError as error:
            torch.cuda.synchronize()  # which does not wait for what never comes
            raise RuntimeError(f"{time.monotonic() - begin:.1f} s: {error}") from error
    raise AssertionError("nothing was raised")


def test_a_killed_rank_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody waits but the watch, which ends the process."""
    begin = time.monotonic()
    outcomes = run_ranks(left_alone, 2, None, backend="nccl", start_method="spawn")
    assert outcomes == [Outcome(), Outcome()]
    printed = capfd.readouterr().err
    assert "leetdist: rank 1 of 2 does not answer: its process," in printed
    assert "on rank 1 for the gradient of the state of" in printed
    assert time.monotonic() - begin < 60


def test_a_timeout_names_a_killed_rank() -> None:
    """The host waits, and can raise."""
    survivor, killed = run_ranks(left_alone, 2, 4.0, backend="nccl")
    assert killed == Outcome()
    words = r"RuntimeError: (\d+\.\d) s: leetdist: rank 1 of 2 does not answer: its process,"
    told = re.search(words, survivor.error or "")
    assert told is not None, survivor
    assert float(told[1]) < 4 + 5
