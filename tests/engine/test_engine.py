"""The engine between the ranks: lanes, hops and bytes."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import leetdist
from leetdist.engine.lanes import make_lanes
from leetdist.engine.planning import plan_call
from leetdist.engine.values import Decays
from leetdist.sequence.pipeline import Job
from leetdist.sequence.virtual import VirtualGroup
from leetdist.testing.equality import Case, compute, differences, make_tensors

CPU = torch.device("cpu")


def sharded_differences(case: Case, ranks: int) -> list[str]:
    tensors = make_tensors(case, CPU, 0)
    single = compute(case, tensors, None)
    ours = leetdist.virtual_ranks(lambda group: compute(case, tensors, group), ranks)
    return [str(d) for rank in range(ranks) for d in differences(case, rank, ranks, ours[rank], single)]


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        Case(600, 16, 24, decay="mixed", tile=32, initial=True, batch=2),
        Case(600, 16, 16, heads=8, kv_heads=4, decay="fast", tile=32, uneven=True, dtype=torch.bfloat16),
        Case(500, 16, 16, decay="gone", tile=64, documents=(0, 70, 70, 333, 500), initial=True),
    ],
    ids=str,
)
def test_lanes_change_no_bit(case: Case, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_LANES", str(lanes))
    for ranks in (2, 5):
        assert sharded_differences(case, ranks) == []


def test_many_ranks_and_empty_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 ranks, one tile each; and more ranks than tiles, so that some hold nothing."""
    monkeypatch.setenv("LEETDIST_LANES", "2")
    assert sharded_differences(Case(64 * 16, 8, 8, heads=2, tile=16), 64) == []
    assert sharded_differences(Case(100, 8, 8, heads=2, decay="gone", tile=32, initial=True), 7) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shards",
    [(16, 0), (33, 0, 0), (0, 16, 0), (0, 0, 21), (32, 0, 16, 0), (16, 0, 0, 5), (3, 0)],
    ids=lambda shards: "-".join(map(str, shards)),
)
def test_ranks_without_tokens(shards: tuple[int, ...], dtype: torch.dtype) -> None:
    """States cross them whatever the decay. In fp64, e^-110 is not 0."""
    case = Case(sum(shards), 8, 8, heads=6, decay="extreme", tile=16, shards=shards, dtype=dtype)
    for initial, final in ((False, True), (True, True), (True, False)):
        assert sharded_differences(replace(case, initial=initial, final=final), len(shards)) == []
    documents = tuple(sorted({0, *(sum(shards) * part // 3 for part in (1, 2)), sum(shards)}))
    packed = replace(case, documents=(*documents, documents[-1]), initial=True)
    assert sharded_differences(packed, len(shards)) == []


def test_what_is_forgotten_follows_the_states_dtype() -> None:
    """e^-110 is 0 in fp32 only, whatever the dtype of log_decay."""
    q, k, v = (torch.randn(1, 1, 32, 8, dtype=torch.float64) for _ in range(3))
    k[:, :, 15] *= 1e48
    log_decay = torch.tensor([-110.0])

    def rank(group: VirtualGroup) -> torch.Tensor:
        mine = (x[:, :, 16 * group.rank : 16 * group.rank + 16] for x in (q, k, v))
        return leetdist.linear_attention(*mine, log_decay, group=group, tile=16)

    one = leetdist.linear_attention(q, k, v, log_decay, tile=16)
    assert torch.equal(torch.cat(leetdist.virtual_ranks(rank, 2), 2), one)
    assert Decays((-110.0, -746.5)).forgetting(1, torch.float64) == [1]
    assert Decays((-110.0, -746.5)).forgetting(1, torch.bfloat16) == [0, 1]


def test_lanes_cover_the_heads() -> None:
    lanes = make_lanes(12, 6, 4, forgetting=frozenset({0, 1, 5, 11}), mute=frozenset({11}))
    assert sorted(h for lane in lanes for h in range(12)[lane.heads]) == list(range(12))
    assert [lane.forgets for lane in lanes] == [True, False, False, False]  # they wait for nobody
    assert lanes[0].heads == slice(0, 2)
    sent = {range(12)[lane.heads][h] for lane in lanes for h in lane.sent}
    assert sent == set(range(11))
    assert len(make_lanes(4, 2, 8)) == 2  # heads that share k and v stay together


def bytes_sent(decay: list[float], lanes: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of forward and backward on each of 4 ranks, without a gradient of log_decay."""
    monkeypatch.setenv("LEETDIST_LANES", str(lanes))

    def rank(group: VirtualGroup) -> tuple[int, int]:
        q, k, v = (torch.randn(1, 4, 128, 16, requires_grad=True) for _ in range(3))
        o = leetdist.linear_attention(q, k, v, torch.tensor(decay), group=group, tile=64)
        forward = group.bytes_sent
        o.sum().backward()
        return forward, group.bytes_sent - forward

    return leetdist.virtual_ranks(rank, 4)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_bytes_are_one_state_a_pass(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(ranks=4, tokens=512, heads=4, dk=16, dv=16, tile=64)
    assert job.state_bytes == 4 * 4 * 16 * 16
    counted = bytes_sent([-0.1, -0.01, -1.0, 0.0], lanes, monkeypatch)
    assert counted == list(zip(job.sent_bytes(), reversed(job.sent_bytes()), strict=True))


def test_mute_heads_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(ranks=4, tokens=512, heads=4, dk=16, dv=16, tile=64)
    for lanes in (1, 2, 4):
        counted = bytes_sent([-200.0, -0.01, -3.0, -106.0], lanes, monkeypatch)
        sent = job.sent_bytes(mute=2)
        assert counted == list(zip(sent, reversed(sent), strict=True))
        assert max(sent) == job.state_bytes // 2


@pytest.mark.parametrize(("decay", "free"), [(-2.0, True), (-0.5, False)])
def test_heads_that_forget_wait_for_nobody(decay: float, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank has its state before the first has sent one, where gamma^tile is 0; else it must not."""
    arrived = threading.Event()
    send, receive = VirtualGroup.send, VirtualGroup.receive
    waited = []

    def slow_send(self: VirtualGroup, tensor: torch.Tensor, to: int, what: str) -> None:
        if self.rank == 0:
            waited.append(arrived.wait(1.0))
        send(self, tensor, to, what)

    def noted_receive(self: VirtualGroup, tensor: torch.Tensor, source: int, what: str) -> torch.Tensor:
        result = receive(self, tensor, source, what)
        if self.rank == 3:
            arrived.set()
        return result

    monkeypatch.setattr(VirtualGroup, "send", slow_send)
    monkeypatch.setattr(VirtualGroup, "receive", noted_receive)
    x = torch.randn(1, 2, 256, 16)
    log_decay = torch.full((2,), decay)

    def rank(group: VirtualGroup) -> torch.Tensor:
        local = leetdist.shard_sequence(x, 2, group, tile=64)
        return leetdist.linear_attention(local, local, local, log_decay, group=group, tile=64)

    shards = leetdist.virtual_ranks(rank, 4)
    assert torch.equal(torch.cat(shards, 2), leetdist.linear_attention(x, x, x, log_decay, tile=64))
    assert waited == [free]


def test_hops_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 3, 128, 16) for _ in range(3))
    decay = torch.tensor([-0.01, -2.0, -200.0])
    options: dict[str, Any] = {
        "scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "method": "auto", "tile": 64
    }  # fmt: skip
    plans = leetdist.virtual_ranks(lambda group: plan_call(q, k, v, decay, transport=group, **options), 4)
    assert {plan.hops() for plan in plans} == {(3, 1, 0)}
    assert [plan.sent_bytes() for plan in plans] == [2 * 4 * 16 * 16] * 3 + [0]
    text = leetdist.virtual_ranks(lambda group: leetdist.explain(q, k, v, decay, tile=64, group=group), 4)[1]
    assert "by virtual, 2,048 bytes from this rank" in text
    assert "3 for 1 of the heads (0); 1 for 1 of the heads (1), which forget within a tile; 0 for 1" in text
    assert "2 of the heads with fewer wait for others in their lane" in text
    monkeypatch.setenv("LEETDIST_LANES", "3")
    text = leetdist.virtual_ranks(lambda group: leetdist.explain(q, k, v, decay, tile=64, group=group), 4)[1]
    assert "wait for others" not in text


def test_all_ranks_plan_the_backward_pass_of_an_initial_state() -> None:
    """Or they would find that they have other kernels than the first rank, whose state alone needs a gradient."""
    x = torch.randn(1, 2, 64, 16)

    def rank(group: Any) -> Any:
        initial = torch.zeros(1, 2, 16, 16, requires_grad=True) if group.rank == 0 else None
        options: Any = {
            "scale": 1.0, "initial_state": initial, "return_state": False, "cu_seqlens": None, "method": "block",
            "tile": 64, "precision": None,
        }  # fmt: skip
        return plan_call(x, x, x, -torch.rand(1, 2, 64), transport=group, **options).operator.kernels.used

    first, *others = leetdist.virtual_ranks(rank, 3)
    assert any(choice.use.reverse for choice in first)
    assert all(kernels == first for kernels in others)


def test_only_the_initial_state_needs_a_gradient() -> None:
    """Then the other ranks' outputs carry its gradient too, though none of their inputs does."""
    x = torch.randn(1, 2, 128, 16)
    start = torch.randn(1, 2, 16, 16)

    def rank(group: Any) -> torch.Tensor | None:
        first = group is None or group.rank == 0
        initial = start.clone().requires_grad_() if first else None
        local = leetdist.shard_sequence(x, 2, group)
        leetdist.linear_attention(local, local, local, initial_state=initial, group=group).sum().backward()
        return None if initial is None else initial.grad

    ours = leetdist.virtual_ranks(rank, 3)[0]
    expected = rank(None)
    assert ours is not None
    assert expected is not None
    assert torch.equal(ours, expected)
