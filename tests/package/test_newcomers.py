"""What people do wrong first is said in words: the layout, the group, the labels, too few tokens for the ranks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

import leetdist

H, N, D = 4, 100, 16
LAYOUT = r"q looks like \(B, N, H, D\), \(\d+, \d+, \d+, \d+\), and must be \(B, H, N, D\): pass q.transpose\(1, 2\)"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_every_public_name_is_listed_and_there() -> None:
    assert set(leetdist.__all__) <= set(dir(leetdist))
    for name in leetdist.__all__:
        assert getattr(leetdist, name) is not None
    fresh = "import leetdist, sys; print(*sorted(set(leetdist.__all__) - set(dir(leetdist)))); leetdist.nope"
    done = subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, check=False)
    assert done.stdout == "\n"  # before anything lazy was looked at
    assert "module 'leetdist' has no attribute 'nope'" in done.stderr


def test_repr_is_short() -> None:
    q, k, v = (torch.randn(2, H, N, D) for _ in range(3))
    stream = leetdist.stream(torch.full((H,), -0.1), tile=16)
    assert "nothing pushed yet" in repr(stream)
    stream.push(q, k, v)
    assert len(repr(stream)) < 200
    assert f"tokens={N}" in repr(stream)


def bnhd(heads: int = H) -> torch.Tensor:
    return torch.randn(1, N, heads, D)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("k", lambda: leetdist.linear_attention(bnhd(), bnhd(2), bnhd(2))),
        ("log_decay", lambda: leetdist.linear_attention(bnhd(), bnhd(), bnhd(), -torch.rand(H))),
        ("log_decay", lambda: leetdist.linear_attention(bnhd(), bnhd(), bnhd(), -torch.rand(1, H, N))),
        (
            "initial_state",
            lambda: leetdist.linear_attention(bnhd(), bnhd(), bnhd(), initial_state=torch.zeros(1, H, D, D)),
        ),
        (
            "cu_seqlens",
            lambda: leetdist.linear_attention(bnhd(), bnhd(), bnhd(), cu_seqlens=torch.tensor([0, 40, N])),
        ),
    ],
)
def test_errors_about_another_layout_say_so(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"^{name} .*{LAYOUT}"):
        call()


def test_errors_about_something_else_do_not() -> None:
    q, k = torch.randn(1, H, N, D), torch.randn(1, H, N // 2, D)
    with pytest.raises(ValueError, match="k must have q's batch and tokens") as caught:
        leetdist.linear_attention(q, k, k)
    assert "looks like" not in str(caught.value)
    with pytest.raises(ValueError, match="log_decay must have shape") as caught:
        leetdist.linear_attention(q, q, q, -torch.rand(H + 1))
    assert "looks like" not in str(caught.value)


def test_another_layout_without_a_decay_is_warned_of() -> None:
    x = torch.randn(1, 1024, 8, D)
    for log_decay in (None, -torch.rand(1, 1024, 8)):  # the second of (B, N, H), as fla's calls have it
        with pytest.warns(UserWarning, match=f"1024 heads of 8 tokens and no decay a head; {LAYOUT}") as caught:
            leetdist.linear_attention(x, x, x, log_decay, tile=16 if log_decay is None else 32)
        assert caught[0].filename == __file__  # the caller's line
    for call in (leetdist.explain, partial(leetdist.linear_attention, method="vanilla")):  # however deep it lies
        with pytest.warns(UserWarning, match=LAYOUT) as caught:
            call(x, x, x)
        assert caught[0].filename == __file__


def test_a_compiled_graph_is_not_broken_by_a_warning() -> None:
    x = torch.randn(1, 1024, 8, D)
    with silence():
        call = partial(leetdist.linear_attention, method="vanilla")
        compiled = torch.compile(lambda: call(x, x, x), fullgraph=True, backend="eager")()
    with pytest.warns(UserWarning, match=LAYOUT):
        torch.testing.assert_close(compiled, call(x, x, x))


def test_calls_that_are_meant_are_not_warned_of() -> None:
    many = torch.randn(1, 1024, 8, D)
    with silence():
        leetdist.linear_attention(many, many, many, torch.zeros(1024))  # the heads have names
        for heads, tokens in ((256, 2), (128, 16), (64, 1), (2, 4096)):
            x = torch.randn(1, heads, tokens, D)
            leetdist.linear_attention(x, x, x)


def shard(tokens: int, ranks: int, tile: int | None = None) -> list[int]:
    x = torch.zeros(tokens)
    return leetdist.virtual_ranks(lambda group: len(leetdist.shard_sequence(x, 0, group, tile=tile)), ranks)


def test_idle_ranks_are_warned_of_and_the_advice_is_right() -> None:
    with pytest.warns(UserWarning, match=r"the fullest rank holds 1,024, 4 of them none; .* pass tile=512") as caught:
        assert shard(4096, 8).count(0) == 4
    assert [told.filename for told in caught] == [__file__]  # from the first rank
    with pytest.warns(UserWarning, match=r"the fullest rank holds 1,024, 2 of them none; .* pass tile=256"):
        assert shard(4096, 6).count(0) == 2  # although the fullest holds 1.5 times its share, no more
    with silence():
        assert shard(4096, 8, 512) == [512] * 8
        for tokens, ranks in ((4096, 4), (1000, 3), (131_072, 8), (100_000, 7), (16, 1), (8192, 3)):
            shard(tokens, ranks)


def test_uneven_shards_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"the fullest rank holds 2,048, the emptiest 1,024; .* pass tile=256 "):
        assert 0 not in shard(8192, 7, 1024)
    with pytest.warns(UserWarning, match=r"the fullest rank holds 16, 3 of them none; share it among fewer ranks$"):
        assert sum(shard(16, 4)) == 16
    batch = {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}
    with pytest.warns(UserWarning, match="share it among fewer ranks$") as caught:
        leetdist.virtual_ranks(lambda group: leetdist.shard_batch(batch, group), 4)
    assert caught[0].filename == __file__


def test_a_group_that_nobody_joined_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun without init_process_group: dist.group.WORLD is None then."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # whatever tests before this one joined
    q = torch.randn(1, 1, 53, D)  # of a shape that no other test has: warned when it is planned
    words = "nothing is sharded, group is None. WORLD_SIZE is 4, and this process has not joined its process group"
    world = None
    with pytest.warns(UserWarning, match=words) as caught:
        leetdist.linear_attention(q, q, q, group=world)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=words):
        leetdist.shard_sequence(q, 2, world)
    with (
        pytest.raises(ValueError, match=r"got None: WORLD_SIZE is 4, .* leetdist.device_mesh, first"),
        leetdist.sequence_parallel(typing.cast(typing.Any, world)),
    ):
        pass
    monkeypatch.setenv("RANK", "1")
    with silence():  # said once a job
        leetdist.shard_sequence(q, 2, world)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with silence():
        leetdist.linear_attention(q[:, :, :51], q[:, :, :51], q[:, :, :51])


def test_labels_left_out_are_missed_in_words() -> None:
    batch = leetdist.shard_batch({"input_ids": torch.arange(32)[None]}, None)
    with pytest.raises(KeyError, match="shift_labels: the batch had neither labels nor shift_labels"):
        batch["shift_labels"]
    assert batch.get("labels") is None
    loader = leetdist.ShardedLoader([{"input_ids": torch.arange(32)[None]}], None)
    with pytest.raises(KeyError, match="labels: the batch had neither"):
        next(iter(loader))["labels"]
    with pytest.raises(KeyError, match=r"^'other'$"):
        batch["other"]


def test_an_int32_index_is_an_index() -> None:
    state = leetdist.stream(torch.full((H,), -0.1), tile=16)
    q, k, v = (torch.randn(1, H, 5, D) for _ in range(3))
    state.push(q, k, v)
    outputs = []
    for dtype in (torch.int32, torch.int64):
        pool = leetdist.StatePool(slots=4, like=state.state)
        (slot,) = pool.put(state.state)
        index = torch.tensor([slot, *pool.fork(slot, 2)], dtype=dtype)
        lengths = torch.tensor([5, 2, 0], dtype=dtype)
        outputs.append(pool.steps(*(x.expand(3, -1, -1, -1) for x in (q, k, v)), index, lengths))
        assert pool.tokens[index.long()].tolist() == [10, 7, 5]
    assert torch.equal(*outputs)
