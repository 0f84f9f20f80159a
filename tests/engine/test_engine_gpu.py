"""The engine on a GPU: lanes and side streams, symmetric memory, CUDA graphs, the compiler."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.sequence import symmetric
from leetdist.sequence.group import resolve
from leetdist.sequence.transport import Transport
from leetdist.testing.equality import Case, check, compute, differences, make_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.real_empty]
CUDA = torch.device("cuda", 0)
CASES = [
    Case(2048, 64, 64, heads=8, kv_heads=4, dtype=torch.bfloat16, decay="mixed", uneven=True, initial=True),
    Case(2500, 64, 64, heads=8, dtype=torch.bfloat16, documents=(0, 1, 850, 1024, 2500)),
]
# The gradient of log_decay has a kernel of its own, which takes long to compile and is tested elsewhere.
CASES = [replace(case, learnt=False) for case in CASES]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lanes_are_equal(case: Case, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_LANES", str(lanes))
    tensors = make_tensors(case, CUDA, 0)
    single = compute(case, tensors, None)
    ours = leetdist.virtual_ranks(lambda group: compute(case, tensors, group), 8)
    found = [str(d) for rank in range(8) for d in differences(case, rank, 8, ours[rank], single)]
    assert found == []


def on_one_gpu(kind: str, node: str = "") -> Transport:
    """This process's transport, beside those of others on the same GPU, which may pretend to be on another node."""
    torch.cuda.set_device(0)
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ["LEETDIST_TIMEOUT"] = "120"  # many tests may share the GPU
    if node:
        home = replace(symmetric.Home.mine(torch.device("cuda", 0)), host=node)
        symmetric.Home.mine = staticmethod(lambda gpu: home)
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:  # the others are in fewer groups
        resolve(pair, kind)
    transport = resolve(dist.group.WORLD, kind)
    assert transport is not None
    assert transport.kind == kind
    return transport


def differing(rank: int, kind: str) -> list[str]:
    os.environ["LEETDIST_BACKEND"] = "torch"  # messages are what is tested, and little has to be compiled
    # Two nodes: ranks 0 and 1 on one, rank 2 on another, a hop of each kind.
    transport = on_one_gpu("symmetric", f"node {rank // 2}") if kind == "two nodes" else on_one_gpu(kind)
    found = []
    for lanes in ("1", "4"):
        os.environ["LEETDIST_LANES"] = lanes
        for seed, case in enumerate(CASES):
            found += [f"{case}: {d}" for d in check(case, transport, CUDA, seed)]
            print(f"rank {rank}, {kind}, {lanes} lanes: {case}", flush=True)
    return found


@pytest.mark.parametrize("kind", ["p2p", "symmetric", "two nodes"])
def test_processes_on_one_gpu(kind: str) -> None:
    for found in values(run_ranks(differing, 3, kind, timeout_s=150)):
        assert found == []


def replayed(rank: int) -> bool:
    """A sharded call, forward and backward, as a CUDA graph, replayed with other inputs."""
    transport = on_one_gpu("symmetric")
    options = {"device": CUDA, "dtype": torch.bfloat16}
    whole = [torch.randn(1, 4, 1024, 64, generator=torch.Generator().manual_seed(n)).to(**options) for n in range(8)]
    decay = torch.tensor([-0.001, -0.01, -3.0, 0.0], device=CUDA)  # one forgets: a graph compares its limit

    def call(q: Tensor, k: Tensor, v: Tensor, do: Tensor, group: Transport | None) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = leetdist.linear_attention(*leaves, decay, group=group, tile=128)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    first, second = whole[:4], whole[4:]
    mine = [leetdist.shard_sequence(x, 2, transport, tile=128).clone() for x in first]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*mine, transport)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        ours = call(*mine, transport)
    equal = True
    for inputs in (first, second, first):
        for x, y in zip(mine, inputs, strict=True):
            x.copy_(leetdist.shard_sequence(y, 2, transport, tile=128))
        graph.replay()
        expected = [leetdist.shard_sequence(x, 2, transport, tile=128) for x in call(*inputs, None)]
        equal = equal and all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    return equal


def test_symmetric_in_a_graph() -> None:
    assert values(run_ranks(replayed, 3, timeout_s=150)) == [True] * 3


def repeated(rank: int, lanes: int) -> tuple[bool, int]:
    """Sharded calls, one after the other, until each place of a message has been seen thrice: whether all are equal to
    one device's, and how many kinds of passes are repeated."""
    from leetdist.kernels.runtime import replay

    os.environ["LEETDIST_LANES"] = str(lanes)
    transport = on_one_gpu("symmetric")
    decay = torch.tensor([-0.001, -0.01, -0.1, 0.0], device=CUDA)
    equal = True
    for seed in range(14):
        generator = torch.Generator().manual_seed(seed)
        whole = [torch.randn(1, 4, 1024, 64, generator=generator).to(CUDA, torch.bfloat16) for _ in range(4)]
        results = []
        for group in (None, transport):
            q, k, v, do = (leetdist.shard_sequence(x, 2, group, tile=128) for x in whole)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            o = leetdist.linear_attention(*leaves, decay, group=group, tile=128)
            results.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
        single, ours = results
        expected = [leetdist.shard_sequence(x, 2, transport, tile=128) for x in single]
        equal = equal and all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    sharded = [r for kind, r in replay._kinds.items() if kind[1] is not None and r is not None]
    return equal, len(sharded)


@pytest.mark.parametrize("lanes", [1, 2])
def test_repeated_sharded_calls(lanes: int) -> None:
    for equal, kinds in values(run_ranks(repeated, 3, lanes, timeout_s=150)):
        assert equal
        assert kinds == 8 // lanes  # forward and backward, from each of four slots, of which each lane takes one


def left_alone(rank: int) -> str | None:
    """The last of two ranks computes, the first does not come."""
    os.environ["LEETDIST_BACKEND"] = "torch"
    transport = on_one_gpu("symmetric")
    x = torch.randn(1, 2, 128, 16, device=CUDA)
    leetdist.linear_attention(x, x, x, group=transport, tile=64)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 0:
        time.sleep(8)
        return None
    try:
        with leetdist.sequence_parallel(transport, lengths=[128, 128], timeout=2):
            leetdist.linear_attention(x, x, x, tile=64)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_symmetric_timeout(capfd: pytest.CaptureFixture[str]) -> None:
    """Who waits ends with a CUDA error, and maybe its process with it; who waited for whom is printed before."""
    _, outcome = run_ranks(left_alone, 2, timeout_s=150, start_method="spawn")
    printed = capfd.readouterr()
    assert "CUDA error" in (outcome.value or printed.err)
    assert "waited too long, this rank: 1" in printed.out
    assert "waited too long, for rank: 0" in printed.out


def test_cuda_graph_and_compiler() -> None:
    q, k, v = (torch.randn(1, 4, 1000, 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    decay = torch.tensor([-0.01, -0.1, -1.0, -200.0], device=CUDA)
    expected = leetdist.linear_attention(q, k, v, decay)
    compiled = torch.compile(leetdist.linear_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, decay), expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = leetdist.linear_attention(q, k, v, decay)
    o.zero_()
    graph.replay()
    assert torch.equal(o, expected)
