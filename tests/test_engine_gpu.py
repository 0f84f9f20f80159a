"""The engine on a GPU: lanes and side streams, symmetric memory, CUDA graphs, the compiler."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
from leetdist.sequence import symmetric
from leetdist.sequence.group import resolve
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


def on_one_gpu(rank: int, kind: str) -> list[str]:
    torch.cuda.set_device(0)
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ["LEETDIST_TIMEOUT"] = "30"
    os.environ["LEETDIST_BACKEND"] = "torch"  # messages are what is tested, and nothing has to be compiled
    if kind == "two nodes":  # ranks 0 and 1 on one, rank 2 on another: a hop of each kind
        real, kind = symmetric._place, "symmetric"
        symmetric._place = lambda: (f"node {rank // 2}", *real()[1:])
    transport = resolve(dist.group.WORLD, kind)
    assert transport.kind == kind
    found = []
    for lanes in ("1", "4"):
        os.environ["LEETDIST_LANES"] = lanes
        for seed, case in enumerate(CASES):
            found += [f"{case}: {d}" for d in check(case, transport, CUDA, seed)]
            print(f"rank {rank}, {kind}, {lanes} lanes: {case}", flush=True)
    return found


@pytest.mark.parametrize("kind", ["p2p", "symmetric", "two nodes"])
def test_processes_on_one_gpu(kind: str) -> None:
    for found in values(run_ranks(on_one_gpu, 3, kind, timeout_s=60)):
        assert found == []


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
