"""Groups in forks, threads and at their end; and what ranks may tell each other."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
from leetdist.integrations.softmax import softmax_attention
from leetdist.operators.problem import Problem
from leetdist.sequence import encoding, memory
from leetdist.sequence.group import resolve
from leetdist.sequence.p2p import PointToPoint
from leetdist.sequence.symmetric import Symmetric
from leetdist.testing.equality import Case, check


def call(group: Any) -> None:
    x = torch.randn(1, 2, 64, 16, requires_grad=True)
    leetdist.linear_attention(x, x, x, group=group).sum().backward()


def test_objects_between_ranks_are_values() -> None:
    problem = Problem(
        1, 2, 2, 1, 16, 16, torch.bfloat16, torch.device("cpu"), 0.1 + 0.2, "auto", None, (0, 5), *[True] * 7, 5
    )  # fmt: skip
    for value in (
        None, True, 3, -(2**62), 0.1 + 0.2, float("inf"), "text \ud7ff", [1, [2]], (1, (2, [])), {}, {"a": (1, 2)},
        {1: None, ("b", 2): 3}, torch.float16, torch.device("cuda", 1), problem, (problem, 7), torch.Size([1, 2]),
    ):  # fmt: skip
        there = encoding.decode(encoding.encode(value))
        assert there == value
        assert type(there) is type(value) or isinstance(value, torch.Size)
    error = encoding.decode(encoding.encode(leetdist.sequence.agreement.Disagreement("words")))
    assert (type(error), str(error)) == (ValueError, "words")
    for strange in (object(), {1, 2}, 1j, torch.zeros(1), lambda: 0, b"bytes", [{"a": object()}]):
        with pytest.raises(TypeError, match="ranks do not send each other"):
            encoding.encode(strange)


class Name(str):
    """Of another type, and equal."""


def with_numpys_numbers(rank: int) -> None:
    group, x, q = dist.group.WORLD, torch.randn(1, 32, 8), torch.randn(1, 2, 32, 8)
    convolve, options = leetdist.nn.causal_conv1d, {"scale": np.float64(0.5), "softcap": np.float32(3)}
    y, state = convolve(x, x[0, :8, :4], activation=Name("silu"), return_state=np.bool_(True), group=group)  # type: ignore[call-overload]
    assert torch.equal(y, convolve(x, x[0, :8, :4], activation="silu", group=group))
    assert state.shape == (1, 3, 8)
    o = softmax_attention(q, q, q, group, boundaries=(0, np.int64(9), 64), **options)
    assert torch.equal(o, softmax_attention(q, q, q, group, boundaries=(0, 9, 64), scale=0.5, softcap=3))
    loss = leetdist.reduce_loss(torch.tensor(4.0), 1, group, total_tokens=np.int64(4), gradients=Name("sum"))  # type: ignore[arg-type]
    assert loss.item() == 2


def test_numpys_numbers_are_told_as_pythons() -> None:
    values(run_ranks(with_numpys_numbers, 2))


def test_damaged_messages_are_refused() -> None:
    whole = encoding.encode({"a": (1, torch.float16, [None, "x"])})
    for length in range(len(whole)):
        with pytest.raises(ValueError):  # noqa: PT011 - json's own words, or ours
            encoding.decode(whole[:length])
    for data in (
        b'{"dtype":"nn"}',
        b'{"os.system":["true"]}',
        b'{"Problem":[1]}',
        b'{"tuple":1}',
        b"{}",
        b'{"a":1,"b":2}',
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            encoding.decode(data)


def wrapped(rank: int) -> list[str]:
    """A rank that shares its node with nobody: all of Symmetric is what it wraps."""
    transport = Symmetric(PointToPoint(dist.new_group()), None)
    transport.seconds = 30.0
    found = check(Case(300, 16, 16, decay="mixed", tile=32, initial=True), transport, torch.device("cpu"))
    assert transport.under.seconds == 30.0
    assert transport.bytes_sent > 0
    assert transport.board is not transport.under.board
    assert "forward pass 1" in str(transport.under.board.mine())
    transport.close()
    with pytest.raises(RuntimeError, match="destroyed"):
        call(transport)
    return [str(difference) for difference in found]


def test_symmetric_wraps_another() -> None:
    assert values(run_ranks(wrapped, 3)) == [[]] * 3


def in_forks(rank: int) -> list[str]:
    """What children say: of a group that the parent used, and of one that it only made."""
    used, new = dist.new_group(), dist.new_group()
    call(used)
    told = []
    for group in (used, new):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                call(group)
                os.write(writing, b"nothing")
            except RuntimeError as error:
                os.write(writing, str(error).encode())
            if group is used:
                resolve(used).close()  # as where the child ends; the parent stays as it was
            os._exit(0)
        os.waitpid(child, 0)
        told.append(os.read(reading, 1000).decode())
    call(used)
    dist.barrier()
    told += [str(resolve(used).board.read(other)) for other in range(2)]
    return told


def test_a_forked_child_is_told() -> None:
    for *told, one, other in values(run_ranks(in_forks, 2)):
        assert all("forked" in words and "process group of the children's own" in words for words in told), told
        assert "is in no call" in one
        assert "is in no call" in other


def two_threads(rank: int) -> str:
    group = dist.new_group()
    call(group)
    transport = resolve(group)
    assert transport is not None
    with transport.call("exchange"):
        said = []

        def other() -> None:
            try:
                call(group)
            except RuntimeError as error:
                said.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    return said[0]


def test_a_second_thread_is_refused() -> None:
    for said in values(run_ranks(two_threads, 2)):
        assert "two threads of rank" in said


def destroyed(rank: int) -> list[int]:
    """Threads and descriptors before, with, and after 8 groups, without garbage collection."""

    def held() -> int:
        return len(os.listdir("/proc/self/task")) + len(os.listdir("/proc/self/fd"))

    call(dist.group.WORLD)
    gc.collect()
    gc.disable()
    counts = [held()]
    groups = [dist.new_group() for _ in range(8)]
    for group in groups:
        call(group)
    transports = [weakref.ref(resolve(group)) for group in groups]
    counts.append(held())
    for group in groups:
        dist.destroy_process_group(group)
    del groups, group
    dist.barrier()
    counts.append(held())
    assert not any(transport() for transport in transports)
    return counts


def test_a_destroyed_group_keeps_nothing() -> None:
    for before, during, after in values(run_ranks(destroyed, 2)):
        assert during >= before + 8
        assert after <= before + 2, (before, during, after)


def stop(rank: int, folder: str, shared: bool) -> str:
    """Rank 0, which keeps the store, stops in the middle; what the others say, and after how long."""
    if not shared:  # as on several hosts
        memory.create = lambda size: (_ for _ in ()).throw(OSError("none"))
    call(dist.group.WORLD)
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    begin = time.monotonic()
    try:
        call(dist.group.WORLD)
    except RuntimeError as error:
        text = f"{time.monotonic() - begin:.1f} {error}"
        Path(folder, f"said-{rank}").write_text(text)
    os._exit(0)


@pytest.mark.parametrize("shared", [True, False])
def test_the_stores_host_stops(shared: bool, tmp_path: Path) -> None:
    waiting = threading.Thread(target=run_ranks, args=(stop, 3, str(tmp_path), shared), kwargs={"timeout_s": 3.0})
    waiting.start()
    deadline = time.monotonic() + 60
    said = [tmp_path / f"said-{rank}" for rank in (1, 2)]
    while time.monotonic() < deadline and not all(path.exists() and path.read_text() for path in said):
        time.sleep(0.1)
    os.kill(int((tmp_path / "0").read_text()), signal.SIGKILL)
    waiting.join()
    for path in said:
        seconds, _, words = path.read_text().partition(" ")
        assert float(seconds) < 3 + 5
        assert "leetdist: rank 0 of 3 does not answer" in words
        assert ("is stopped" if shared else "the store of the job") in words


def out_of_step(rank: int, what: str) -> str:
    group = dist.new_group(timeout=timedelta(seconds=2))
    x = torch.randn(1, 2, 64, 16, requires_grad=True)
    try:
        for number in range(3):
            o = leetdist.linear_attention(x, x, x, group=group)
            if what == "raises" and rank == 1 and number == 1:
                continue  # its own code raised, was caught, and went on
            if what == "skips" and rank == 1 and number == 2:
                return "skipped"
            o.sum().backward()
    except RuntimeError as error:
        return str(error)
    finally:
        time.sleep(4)  # alive, in no call
    return "nothing"


@pytest.mark.parametrize("what", ["raises", "skips"])
def test_ranks_that_lose_step(what: str) -> None:
    said = [outcome.value or outcome.error for outcome in run_ranks(out_of_step, 3, what)]
    for rank in (0, 2):
        assert "rank 1 of 3 does not answer" in said[rank], said
    if what == "skips":
        assert "it is in no call of this group (its last: forward pass 3, backward pass 2)" in said[0]
    else:  # whoever gives up first says what all do
        words = "rank 1 is in agreement after forward pass 2, backward pass 1 and waits for rank 0"
        assert any("the ranks make different calls of this group" in each and words in each for each in said), said


EARLY = """
import sys, threading, os, signal, time, torch, leetdist
x = torch.randn(1, 1, 64, 16)
def rank(group):
    if sys.argv[1] == "stuck" and group.rank == 1:
        time.sleep(30)
    while True:
        leetdist.linear_attention(x, x, x, group=group)
threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    leetdist.virtual_ranks(rank, 3)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("how", ["busy", "stuck"])
def test_virtual_ranks_end_with_ctrl_c(how: str) -> None:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", EARLY, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert time.monotonic() - begin < 25


def test_a_virtual_rank_that_has_returned_is_named() -> None:
    x = torch.randn(1, 1, 64, 16)

    def rank(group: Any) -> None:
        if group.rank != 1:
            leetdist.linear_attention(x, x, x, group=group)

    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of 3 has returned, and rank [02] still waits"):
        leetdist.virtual_ranks(rank, 3)
    assert time.monotonic() - begin < 5
