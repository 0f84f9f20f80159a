"""Ranks agree before they exchange tensors, and a rank that fails, is late or breaks its word is named."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
from leetdist.engine import planning
from leetdist.engine import values as engine_values
from leetdist.sequence.group import resolve
from leetdist.sequence.p2p import TENSORS, PointToPoint
from leetdist.sequence.virtual import VirtualGroup


class Count:
    """Host messages of the virtual ranks, by kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        for name in ("gather_objects", "swap_header"):
            monkeypatch.setattr(VirtualGroup, name, self.counting(name, getattr(VirtualGroup, name)))

    def counting(self, name: str, real: Any) -> Any:
        def counted(group: VirtualGroup, *args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return real(group, *args, **options)

        return counted

    def take(self) -> tuple[int, int]:
        calls, self.calls = self.calls, Counter()
        return calls["gather_objects"], calls["swap_header"]


def test_agreement_is_exchanged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """First call: everything. Same again: log2 P small messages a rank. Declared lengths: none."""
    count, ranks = Count(monkeypatch), 4
    seen: list[tuple[int, int]] = []
    barrier = threading.Barrier(ranks)

    def rank(group: VirtualGroup) -> None:
        x = torch.randn(1, 1, 64, 16)

        def counted(call: Any) -> None:
            call()
            if barrier.wait() == 0:
                seen.append(count.take())
            barrier.wait()

        def call() -> None:
            leetdist.linear_attention(x, x, x, group=group)

        counted(call)
        counted(call)
        with leetdist.sequence_parallel(group, lengths=[64] * ranks):
            counted(call)

    leetdist.virtual_ranks(rank, ranks)
    assert seen == [(ranks, 2 * ranks), (0, 2 * ranks), (0, 0)]


def change_one_thing_on_one_rank(rank: int) -> tuple[list[str], list[int]]:
    """What each call ended in, and how many messages the hosts sent for it."""
    transport = resolve(dist.group.WORLD)
    assert isinstance(transport, PointToPoint)
    x, decays = torch.randn(1, 2, 64, 16), torch.tensor([-0.1, -0.2])
    usual = {"log_decay": decays, "scale": 1.0, "tile": 32, "return_state": False, "method": "block", "precision": None}
    changes = [
        {"scale": 2.0}, {"tile": 64}, {"return_state": True}, {"method": "lightning"}, {"log_decay": None},
        {"precision": "high"}, {"log_decay": torch.tensor([-0.1, -0.3])}, {"log_decay": torch.tensor([-0.1, 1.0])},
        {"scale": "large"},
    ]  # fmt: skip
    sent: list[int] = []
    real = PointToPoint._send

    def counted(group: Any, tensor: torch.Tensor, to: int, what: str, tag: int) -> Any:
        sent[-1] += tag != TENSORS
        return real(transport, group, tensor, to, what, tag)

    ended = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "_send", counted)
        for change in ({}, {}, {}, *changes):
            for options in (change if rank == 1 else {}, {}):
                sent.append(0)
                ended.append(raised(transport, x, x, x, **usual | options))  # type: ignore[arg-type]
    return ended, sent


def test_nothing_is_sent_until_one_rank_changes_one_thing() -> None:
    """On one host what is known is compared in shared memory; whatever one rank changes, all are told, and go on."""
    words = [
        "scale: rank 1 has 2.0", "tile: rank 1 has 64", "return_state: rank 1 has True", "method: rank 1 has lightning",
        "those of rank 1 are not", "precision: rank 1 has high", "those of rank 1 are not", "log_decay must be <= 0",
        "scale must be",
    ]  # fmt: skip
    for ended, sent in values(run_ranks(change_one_thing_on_one_rank, 3)):
        assert not any(ended[:6])
        assert sent[0] > 0
        assert sent[1:6] == [0] * 5
        for word, error, count in zip(words, ended[6::2], sent[6::2], strict=True):
            assert word in error
            assert count > 0
        assert not any(ended[7::2])


def test_a_change_on_one_rank_is_seen_by_all() -> None:
    """Rank 0's shard is as ever while rank 1's shrinks, and with it the total and the tile length: no stale plan."""
    x = torch.randn(1, 2, 512, 16)

    def rank(group: VirtualGroup) -> list[torch.Tensor]:
        results = []
        for last in (256, 100, 256, 100):
            local = x[:, :, :256] if group.rank == 0 else x[:, :, 256 : 256 + last]
            results.append(leetdist.linear_attention(local, local, local, group=group))
        return results

    ours = leetdist.virtual_ranks(rank, 2)
    for i, last in enumerate((256, 100, 256, 100)):
        whole = x[:, :, : 256 + last]
        assert torch.equal(torch.cat([ours[0][i], ours[1][i]], 2), leetdist.linear_attention(whole, whole, whole))


def raised(group: Any, *args: Any, **kwargs: Any) -> str:
    try:
        leetdist.linear_attention(*args, group=group, **kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_disagreement_after_agreement() -> None:
    """One rank comes with what it has used before, another with something else: an error on both, then all is well."""
    x = torch.randn(1, 2, 64, 16)
    decays = [torch.tensor([-0.1, -0.2]), torch.tensor([-0.1, -0.3])]

    def rank(group: VirtualGroup) -> list[str]:
        errors = [raised(group, x, x, x, decays[0])]
        errors.append(raised(group, x, x, x, decays[0], scale=1.0 if group.rank == 0 else 2.0))
        errors.append(raised(group, x, x, x, decays[group.rank]))
        errors.append(raised(group, x, x, x, decays[0]))
        return errors

    for errors in leetdist.virtual_ranks(rank, 2):
        assert errors[0] == errors[3] == ""
        assert "disagree on scale: rank 1 has 2.0, rank 0 has 1.0" in errors[1]
        assert "disagree on the values of log_decay" in errors[2]


def test_broken_promise() -> None:
    """`lengths` that one rank does not keep: a ValueError there, an end, not a wrong result, elsewhere."""
    x = torch.randn(1, 2, 128, 16)

    def rank(group: VirtualGroup) -> list[str]:
        errors = []
        with leetdist.sequence_parallel(group, lengths=[64, 64], timeout=0.5):
            for tokens in (64, 64, 64 if group.rank == 0 else 32):
                local = x[:, :, :tokens]
                errors.append(raised(group, local, local, local, return_state=True))
        return errors

    first, second = leetdist.virtual_ranks(rank, 2)
    assert first[:2] == second[:2] == ["", ""]
    assert "rank 1 of 2 has returned, and rank 0 still waits for" in first[2]
    assert "ValueError: q: sequence_parallel(lengths=[64, 64]) promises 64 tokens on rank 1, got 32" in second[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": [1, 2]}, "lengths must be 1 numbers"),
        ({"lengths": [-1]}, "lengths must be 1 numbers"),
        ({"timeout": 0}, "timeout must be a positive"),
        ({"transport": "pigeon"}, "transport"),
    ],
)
def test_sequence_parallel_arguments(options: dict[str, Any], words: str) -> None:
    def rank(group: VirtualGroup) -> None:
        with pytest.raises(ValueError, match=words), leetdist.sequence_parallel(group, **options):
            pass

    leetdist.virtual_ranks(rank, 1)


def test_no_group_is_no_sequence_parallel() -> None:
    def rank(group: VirtualGroup) -> None:
        nobody: Any = None
        with (
            leetdist.sequence_parallel(group),  # nor is the one around it meant
            pytest.raises(ValueError, match=r"group must be .* got None"),
            leetdist.sequence_parallel(nobody),
        ):
            pass

    leetdist.virtual_ranks(rank, 1)


def test_timeout_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_TIMEOUT", "0.2")
    x = torch.randn(1, 1, 64, 16)

    def rank(group: VirtualGroup) -> None:
        if group.rank == 0:
            threading.Event().wait(1.0)
            return
        leetdist.linear_attention(x, x, x, group=group)

    with pytest.raises(RuntimeError, match=r"Rank 1 waited 0.2 s"):
        leetdist.virtual_ranks(rank, 2)
    for bad in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("LEETDIST_TIMEOUT", bad)
        with pytest.raises(ValueError, match="LEETDIST_TIMEOUT must be a positive number of seconds"):
            leetdist.virtual_ranks(rank, 1)


def test_no_call_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that fails between two messages must not take the leftovers for the next call's."""
    x = torch.randn(1, 2, 64, 16)

    def rank(group: VirtualGroup) -> list[str]:
        errors = []
        with leetdist.sequence_parallel(group, timeout=0.5):
            with pytest.MonkeyPatch.context() as patch:
                if group.rank == 1:
                    patch.setattr(group, "receive_state", broken)
                errors.append(raised(group, x, x, x, return_state=True))
            errors.append(raised(group, x, x, x, return_state=True))
        return errors

    def broken(*_: Any) -> None:
        raise RuntimeError("planted")

    first, second = leetdist.virtual_ranks(rank, 2)
    assert second[0] == "RuntimeError: planted"
    assert "rank 1 of 2 has returned, and rank 0 still waits for" in first[0]
    for later in (first[1], second[1]):
        assert "an earlier call on this group failed" in later


def test_a_rank_that_fails_is_named_with_lane_and_direction() -> None:
    x = torch.randn(1, 2, 64, 16)

    def rank(group: VirtualGroup) -> None:
        group.seconds = 0.3
        if group.rank == 0:
            threading.Event().wait(1.0)  # alive, but late
            return
        leetdist.linear_attention(x, x, x, group=group)

    with pytest.raises(RuntimeError, match=r"rank 0 of 2 does not answer. Rank 1 waited 0.3 s") as caught:
        leetdist.virtual_ranks(rank, 2)
    assert "the shapes and arguments" in str(caught.value)

    def inside(group: VirtualGroup) -> None:
        with leetdist.sequence_parallel(group, lengths=[64, 64], timeout=0.3):
            leetdist.linear_attention(x, x, x)
            if group.rank == 0:
                threading.Event().wait(1.0)
                return
            leetdist.linear_attention(x, x, x)

    with pytest.raises(RuntimeError, match=r"the state of heads 0 to 1 \(forward scan\)"):
        leetdist.virtual_ranks(inside, 2)


def test_calls_in_another_order_are_told() -> None:
    """Of equal shapes, they are paired wrongly: a warning names the lines, once; the same order is no matter."""
    x = torch.randn(1, 2, 64, 16)

    def first(group: VirtualGroup) -> None:
        leetdist.linear_attention(x, x, x, group=group)

    def second(group: VirtualGroup) -> None:
        leetdist.linear_attention(x, -x, x, group=group)

    def rank(group: VirtualGroup, swapped: bool) -> None:
        for _ in range(3):
            for call in (second, first) if swapped and group.rank == 1 else (first, second):
                call(group)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leetdist.virtual_ranks(lambda group: rank(group, False), 3)
    words = r"rank 1 makes this call in test_agreement\.py:\d+ \(second\), rank 0 in test_agreement\.py:\d+ \(first\)"
    with pytest.warns(RuntimeWarning, match=words) as told:
        leetdist.virtual_ranks(lambda group: rank(group, True), 3)
    assert [x.filename for x in told] == 3 * [__file__]  # on every rank, once for these two lines


def test_a_site_is_the_programs_line() -> None:
    """Not leetdist's own, nor PyTorch's between the two."""
    seen: list[Any] = []

    def rank(group: VirtualGroup) -> None:
        layer = leetdist.nn.LightningAttention(32, 2, group=group)
        torch.nn.Sequential(layer)(torch.randn(1, 32, 32))

    agree = planning.agree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "agree", lambda *args, **kwargs: seen.append(kwargs["site"]) or agree(*args, **kwargs))
        leetdist.virtual_ranks(rank, 2)
    assert {site.words.partition(":")[0] for site in seen} == {"test_agreement.py"}


def test_decays_that_one_rank_has_read_alone_are_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compiled calls on GPUs, which may not read them: rehearsed on the CPU."""
    here, decays_of = threading.local(), planning.decays_of
    monkeypatch.setattr(planning, "decays_of", lambda x, *, read=True: decays_of(x) if read or here.rank == 0 else None)
    x, decay = torch.randn(1, 2, 32, 16), torch.tensor([-0.1, -50.0])
    options: dict[str, Any] = {
        "scale": 1.0, "initial_state": None, "return_state": False, "cu_seqlens": None, "method": "auto", "tile": 16,
        "precision": None, "read_values": False, "sees_grads": False,
    }  # fmt: skip

    def rank(group: VirtualGroup) -> list[int]:
        here.rank = group.rank
        plans = [planning.plan_call(x, x, x, decay, transport=group, **options) for _ in range(3)]
        assert plans[0] is plans[2]
        return [len(plans[0].lanes), *(lane.width for lane in plans[0].lanes)]

    first, second = leetdist.virtual_ranks(rank, 2)
    assert first == second


def test_decays_that_are_learnt_on_a_gpu_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed on the CPU: one plan for all steps, one device's bits, and NaN from what is no log-decay."""
    monkeypatch.setattr(engine_values, "_on_gpu", lambda x: True)
    x = torch.randn(1, 2, 64, 16)
    decay = torch.tensor([-0.1, -5.0], requires_grad=True)

    def step(group: Any) -> list[torch.Tensor]:
        shard = leetdist.shard_sequence(x, 2, group, tile=32)
        o = leetdist.linear_attention(shard, shard, shard, decay, group=group, tile=32)
        return [o.detach(), *torch.autograd.grad(o.sum(), decay)]

    def rank(group: VirtualGroup) -> list[list[torch.Tensor]]:
        results = []
        for value in (-0.1, -0.2, -0.3):
            with torch.no_grad():
                decay[0] = value  # by all ranks, the same
            results.append(step(group))
            barrier.wait()
        assert len(group.plans) == 1
        return results

    barrier = threading.Barrier(2)
    first, second = leetdist.virtual_ranks(rank, 2)
    for value, (left, left_grad), (right, right_grad) in zip((-0.1, -0.2, -0.3), first, second, strict=True):
        with torch.no_grad():
            decay[0] = value
        o, grad = step(None)
        assert torch.equal(torch.cat([left, right], 2), o)
        assert torch.equal(left_grad + right_grad, grad)
    with torch.no_grad():
        decay[1] = 0.1
    o, grad = step(None)
    assert torch.equal(o.isnan().any(-1).any(-1), torch.tensor([[False, True]]))
    monkeypatch.setenv("LEETDIST_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=r"log_decay must be <= 0 .* for head 1"):
        step(None)
