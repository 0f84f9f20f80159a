"""NCCL's own calls: their arguments and order, what happens where they fail, and who is named."""

from __future__ import annotations

import os
import signal
import threading
import time
from ctypes import CFUNCTYPE, POINTER, c_int, c_void_p
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import Outcome, run_ranks, values
from leetdist.sequence import blame, direct, nccl, watch
from leetdist.sequence.board import Board
from leetdist.sequence.direct import Direct
from leetdist.sequence.nccl import Communicator, Identity, Library, in_time
from leetdist.sequence.p2p import PointToPoint
from leetdist.testing.equality import Case, check
from nccl_standin import HANDLE, Event, Symbols, by_gloo, nccl_by_gloo, until

CPU = torch.device("cpu")
CASES = [
    Case(300, 16, 16, heads=2, tile=32, initial=True, decay="mixed", uneven=True),
    Case(300, 16, 16, heads=4, kv_heads=2, tile=32, documents=(0, 1, 120, 300)),
    Case(300, 16, 16, heads=2, tile=32, decay="slow", learnt=True),
]


def test_calls_and_their_arguments() -> None:
    symbols = Symbols()
    library = Library(symbols)
    made = Communicator(library, library.identity(), 1, 3)
    made.sender(16, 2)(9, 1000)
    with made.together():
        made.sender(1, 0)(9, 2000)
        made.receiver(2, 2)(9, 3000)
    assert made.error() is None
    made.abort()
    made.abort()
    assert [call for call in symbols.calls if call[0] in ("Send", "Recv")] == [
        ("Send", 1000, 16, 1, 2, HANDLE, 9),
        ("Send", 2000, 1, 1, 0, HANDLE, 9),
        ("Recv", 3000, 2, 1, 2, HANDLE, 9),
    ]
    assert symbols.names() == [
        "GetUniqueId", "CommInitRank", "Send", "GroupStart", "Send", "Recv", "GroupEnd", "CommGetAsyncError",
        "CommAbort",
    ]  # fmt: skip
    assert symbols.calls[-1] == ("CommAbort", HANDLE)
    assert made.error() is None  # it has ended
    assert symbols.names().count("CommGetAsyncError") == 1


def test_the_identity_goes_by_value() -> None:
    """All 128 bytes, beside the other arguments, as a C function gets them."""
    seen: list[Any] = []

    @CFUNCTYPE(c_int, POINTER(c_void_p), c_int, Identity, c_int)
    def begin(handle: Any, size: int, identity: Identity, rank: int) -> int:
        seen.append((size, bytes(identity), rank))
        handle[0] = HANDLE
        return 0

    symbols = Symbols()
    symbols.ncclCommInitRank = begin
    wanted = os.urandom(128)
    made = Communicator(Library(symbols), wanted.hex(), 2, 5)
    assert seen == [(5, wanted, 2)]
    assert made.handle.value == HANDLE


def test_errors_are_told() -> None:
    symbols = Symbols()
    library = Library(symbols)
    made = Communicator(library, library.identity(), 0, 2)
    symbols.results = {"Send": 3, "async": 6}
    with pytest.raises(RuntimeError, match="NCCL: error 3, of the last words"):
        made.sender(4, 1)(0, 8)
    assert made.error() == "NCCL: error 6, of the last words"
    symbols.results = {"GroupEnd": 2}
    with pytest.raises(RuntimeError, match="NCCL: error 2"), made.together():
        pass


def test_a_communicator_may_end_while_it_is_asked() -> None:
    """By a collection of garbage, in the thread that asks."""
    symbols = Symbols()
    made = Communicator(Library(symbols), bytes(range(128)).hex(), 0, 2)
    made.nccl.get_error = lambda handle, found: made.abort() or 0
    assert in_time(made.error, 5) is None
    assert symbols.names()[-1] == "CommAbort"


def test_no_library() -> None:
    """One that lacks a function is none."""
    with pytest.raises(AttributeError, match="ncclGetUniqueId"):
        Library(SimpleNamespace())


def test_what_takes_too_long() -> None:
    assert in_time(lambda: 5, 10) == 5
    with pytest.raises(ValueError, match="own"):
        in_time(lambda: int("own"), 10)
    ended = threading.Event()
    with pytest.raises(nccl.Late, match="nothing came back in"):
        in_time(ended.wait, 0.01)
    ended.set()


def served(rank: int) -> tuple[list[str], list[str]]:
    transport = PointToPoint(dist.group.WORLD)
    with nccl_by_gloo(transport) as symbols:
        found = [str(d) for seed, case in enumerate(CASES) for d in check(case, transport, CPU, seed)]
        bytes_sent = transport.bytes_sent
        total = sum(call[2] for call in symbols.calls if call[0] == "Send")
        assert bytes_sent == total
        assert transport.pending == []
        transport.close()
        return found, symbols.names()


def test_processes_by_nccl() -> None:
    """The bits of one device, forward and backward: chains, exchanges both ways, packed and uneven shards."""
    for found, names in values(run_ranks(served, 3)):
        assert found == []
        assert names.count("CommInitRank") == names.count("CommAbort") == 1
        assert names.count("Send") > 10
        assert names.count("GroupStart") == names.count("GroupEnd") > 1
        assert names[-1] == "CommAbort"


def test_what_the_host_waits_for_stays_on_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    board = Board.alone()
    transport: Any = SimpleNamespace(board=board, processes=[])
    made = Direct(transport, transport, CPU)
    made.say_waits({"for a state": 2})
    assert (board.mine().other, board.mine().what) == (2, "for a state")
    made.say_goes_on()
    assert board.mine().other == -1
    made.say_waits({"for a state": 2})
    board.wait(3, "for the arguments")
    made.say_goes_on()
    assert (board.mine().other, board.mine().what) == (3, "for the arguments")


def lazily(rank: int) -> list[bool]:
    """Tensors of which a bit says that their numbers are to be negated, or conjugated."""
    transport = PointToPoint(dist.group.WORLD)
    with nccl_by_gloo(transport):
        whole = torch._neg_view(torch.arange(8.0)), torch.complex(torch.arange(8.0), torch.ones(8)).conj()
        equal = [
            torch.equal(leetdist.gather_sequence(leetdist.shard_sequence(x, 0, transport, tile=4), 0, transport), x)
            for x in whole
        ]
        for x in whole:
            received = torch.empty(8, dtype=x.dtype)
            with transport.call("exchange"):
                if rank == 0:
                    transport.send(x, 1, "numbers")
                else:
                    equal.append(torch.equal(transport.receive(received, 0, "numbers"), x))
        return equal


def test_what_is_negated_when_it_is_read() -> None:
    assert values(run_ranks(lazily, 2)) == [[True] * 2, [True] * 4]


def not_everywhere(rank: int, what: str) -> list[Any]:
    """A rank lacks the library, or cannot begin: nobody takes it, and calls go on."""
    transport = PointToPoint(dist.group.WORLD)
    symbols = Symbols(by_gloo)
    library = Library(symbols)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(transport, "capturing", lambda: False)
        if rank == 1 and what == "begin":
            symbols.results = {"CommInitRank": 1}
        patch.setattr(Library, "found", lambda: None if rank == 1 and what == "library" else library)
        with transport.call("set-up"):
            made = direct.connect(transport, CPU)
    return [made is None, symbols.names(), [str(d) for d in check(CASES[0], transport, CPU, 0)]]


@pytest.mark.parametrize("what", ["library", "begin"])
def test_all_ranks_decide_alike(what: str) -> None:
    for rank, (none, names, found) in enumerate(values(run_ranks(not_everywhere, 2, what))):
        assert none
        assert found == []
        assert names.count("CommAbort") == (what == "begin" and rank == 0)
        assert "Send" not in names


def fails(rank: int) -> tuple[str, list[str]]:
    blame.ROLL_CALL_SECONDS = 0.5
    transport = PointToPoint(dist.group.WORLD)
    with nccl_by_gloo(transport) as symbols:
        if rank == 1:
            return "", []
        symbols.results = {"Send": 6}
        with transport.call("exchange"), pytest.raises(RuntimeError) as raised:
            transport.send(torch.ones(3), 1, "a state")
        return str(raised.value), symbols.names()


def test_an_error_names_the_rank() -> None:
    (words, names), _ = values(run_ranks(fails, 2))
    assert "rank 1 of 2 does not answer" in words
    assert "on rank 1 to take a state" in words
    assert "NCCL: error 6, of the last words" in words
    assert names[-1] == "CommAbort"  # else the program would wait for its GPU


def late(rank: int) -> str:
    """With a timeout the host waits, and the rank that has ended is named: not the one of the last message."""
    blame.ROLL_CALL_SECONDS = 0.5
    transport = PointToPoint(dist.group.WORLD)
    with nccl_by_gloo(transport) as symbols:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        until(lambda: transport.direct.watch.asleep)  # the greeting has come through
        symbols.carry = None
        transport.direct.connected |= {0, ~0, 1, ~1, 2, ~2}
        Event.stuck = True
        transport.seconds = 0.5
        while transport.processes[2].state() == "runs":
            time.sleep(0.01)
        if rank == 1:
            with transport.call("exchange"):
                transport.send(torch.ones(3), 2, "a state")
                try:
                    transport.receive(torch.ones(3), 0, "another")
                except RuntimeError as error:
                    assert symbols.names()[-1] == "CommAbort"  # else the program would wait for its GPU
                    return str(error)
        time.sleep(3)  # runs, and is not at fault
        return ""


def test_a_timeout_names_the_rank() -> None:
    _, outcome, killed = run_ranks(late, 3)
    assert killed == Outcome()
    assert "rank 2 of 3 does not answer: its process," in outcome.value
    assert "on rank 2 to take a state" in outcome.value


def never(rank: int) -> None:
    """Rank 0 has ended; rank 1, which waits for its GPU, is ended by the watch."""
    blame.ROLL_CALL_SECONDS = watch.SECONDS = 0.2
    group = dist.new_group(timeout=timedelta(seconds=2))
    transport = PointToPoint(group)
    direct.GRACE = 0.2
    with nccl_by_gloo(transport) as symbols:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        until(lambda: transport.direct.watch.asleep)  # the greeting has come through
        symbols.carry, Event.stuck = None, True
        with transport.call("forward pass"):
            transport.receive(torch.ones(3), 0, "a state")
            time.sleep(30)  # before the end of the pass


def test_the_watch_names_the_rank(capfd: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    outcomes = run_ranks(never, 2, start_method="spawn")
    assert outcomes == [Outcome(), Outcome()]
    printed = capfd.readouterr().err
    assert "leetdist: rank 0 of 2 does not answer: its process," in printed
    assert "on rank 0 for a state" in printed
    assert time.monotonic() - begin < 25


def leaves(rank: int) -> list[str]:
    """Messages under way have some time; a graph's keep the communicator."""
    direct.CLOSE_SECONDS = 0.2
    names = []
    for in_graphs in (False, True):
        transport = PointToPoint(dist.group.WORLD)
        with nccl_by_gloo(transport) as symbols:
            transport.direct.communicator.in_graphs = in_graphs
            Event.stuck = not in_graphs
            begin = time.monotonic()
            transport.close()
            transport.close()
            assert time.monotonic() - begin < 3
            names += [name for name in symbols.names() if name == "CommAbort"]
        Event.stuck = False
    return names


def test_the_end_of_a_group() -> None:
    assert values(run_ranks(leaves, 2)) == [["CommAbort"]] * 2


def explained(rank: int) -> str:
    transport = PointToPoint(dist.group.WORLD)
    with nccl_by_gloo(transport):
        x = torch.randn(1, 2, 64, 16)
        return leetdist.explain(x, x, x, group=transport, tile=32)


def test_explain_names_it() -> None:
    for words in values(run_ranks(explained, 2)):
        assert "by p2p (NCCL's own calls)" in words
