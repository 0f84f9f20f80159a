"""What ranks of one host share: symmetric memory with its kernels, and the hosts' mailboxes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from leetdist.sequence import mailbox as mailboxes
from leetdist.sequence.board import Board
from leetdist.sequence.inboxes import SLOTS, Box, Inboxes, Renumbered
from leetdist.sequence.ledger import CALLS, Ledger
from leetdist.sequence.mailbox import Gone, Mailbox
from leetdist.sequence.memory import Process, attach, create
from leetdist.sequence.symmetric import Home, why_not


def test_where_symmetric_memory_can_be() -> None:
    one, two = Home("a", "0"), Home("a", "1")
    assert why_not([one, two]) is None
    assert why_not([one, one]) == "ranks 0 and 1 share a GPU"
    assert why_not([replace(one, may_share=True)] * 2) is None
    assert why_not([one, Home("a", None)]) == "rank 1 has no GPU"
    assert why_not([one, Home("b", "0")]) == "no two ranks are on one host"
    assert why_not([one, two, Home("b", "0")]) is None
    assert "rank 1 has no direct access" in str(why_not([one, replace(two, reaches=False)]))


def test_symmetric_boxes() -> None:
    """Every flag and slot of a rank's memory has a place of its own, and all of the memory is used."""
    programs, slot = 4, 64
    memory = torch.zeros(Box.words(slot, programs), dtype=torch.int32)
    box = Box(memory, programs)
    parts = [part for kind in (box.slots, box.full, box.free) for direction in kind for part in direction]
    assert [part.numel() for part in parts] == 2 * SLOTS * [slot] + 4 * SLOTS * [programs]
    for part in parts:
        part += 1
    assert torch.equal(memory, torch.ones_like(memory))
    message = box.message(1, 2, (4, 8), torch.float64)
    assert message.shape == (4, 8)
    assert message.data_ptr() == box.slots[1][2].data_ptr()


def test_what_has_no_room_in_a_slot_goes_by_other_ways() -> None:
    inboxes = object.__new__(Inboxes)
    inboxes.local, inboxes.slot_words = {0: 0, 1: 1}, 64
    on_gpu, on_cpu = SimpleNamespace(is_cuda=True), torch.zeros(1)
    served = [inboxes.serves(on_gpu, size, rank) for size, rank in ((256, 1), (257, 1), (8, 2))]
    assert served == [True, False, False]
    assert not inboxes.serves(on_cpu, 8, 1)


def test_exchanges_are_counted_by_group() -> None:
    """PyTorch counts a process's exchanges over all groups: here two ranks come with different numbers."""
    store = HashStore()
    one, two = Renumbered(store), Renumbered(store)
    for first, second in ((0, 4), (1, 7), (2, 8)):
        one.set(f"CUDASymmetricMemory/{first}/0", b"\x00\xff" + bytes([first]))
        two.set(f"CUDASymmetricMemory/{second}/1", b"other")
        assert two.get(f"CUDASymmetricMemory/{second}/0") == b"\x00\xff" + bytes([first])
        one.wait([f"CUDASymmetricMemory/{first}/1"])
        assert one.check([f"CUDASymmetricMemory/{first}/1"])
    one.set("another/key", b"1")
    assert store.get("another/key") == b"1"


@pytest.mark.gpu
@pytest.mark.interpreter
def test_hop_kernels() -> None:
    """Two ranks' memory in one process: what is put arrives whole, and the flags are as before, ready for another."""
    from leetdist.kernels.common import hop

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for words in (1, 999, hop.PIECES * hop.LEAST + 5, 9 * hop.PIECES * hop.BLOCK)[: 4 if device == "cuda" else 2]:
        memory = torch.zeros(2, Box.words(words, hop.PIECES), dtype=torch.int32, device=device)
        sender, receiver = (Box(own, hop.PIECES) for own in memory)
        sender.free[0][2].fill_(1)
        slot = receiver.message(0, 2, (words,), torch.float32)
        there, here = (
            hop.Way(slot, receiver.full[0][2], sender.free[0][2], (rank, 1 - rank), seconds=1.0) for rank in (0, 1)
        )
        for _ in range(2):
            state = torch.randn(words, device=device)
            hop.put(state, there)
            assert [int(x.sum()) for x in (there.free, there.full)] == [hop.PIECES - there.pieces, there.pieces]
            hop.look(here)
            hop.wait(here)
            assert int(here.full.sum()) == 0
            assert torch.equal(slot, state)
            hop.release(here)
            assert int(here.free.sum()) == hop.PIECES
        assert not receiver.slots[0][1].any()


@pytest.mark.interpreter
def test_which_folds_take_and_hand_on_by_themselves() -> None:
    """Pieces lie within a head, and a program holds as many of its numbers as it can."""
    from leetdist.kernels.common import hop

    fits = {(1, 32, 128, 128): True, (1, 8, 64, 64): True, (4, 32, 128, 128): True, (8, 32, 128, 128): False}
    fits |= {(3, 32, 128, 128): True, (1, 4, 16, 16): False, (1, 2, 24, 40): False, (0, 32, 128, 128): False}
    assert {shape: hop.can_fold(shape, torch.float32) for shape in fits} == fits
    assert not hop.can_fold((1, 32, 128, 128), torch.float64)


def boxes(ranks: int, processes: list[Process] | None = None) -> tuple[list[Mailbox], list[Board]]:
    letters = Mailbox.bytes(ranks)
    size = letters + Board.bytes(ranks)
    handle, address = create(size)
    try:
        memories = [attach(address, size) for _ in range(ranks)]
    finally:
        os.close(handle)
    processes = processes or [Process.mine()] * ranks
    return (
        [Mailbox(memory[:letters], rank, processes) for rank, memory in enumerate(memories)],
        [Board(memory[letters:], rank) for rank, memory in enumerate(memories)],
    )


def test_ranks_see_whether_they_come_with_the_same() -> None:
    """The same answer on every rank, letter after letter, whoever of them it is that differs."""
    ranks, letters = 3, 500

    def rank(mailbox: Mailbox, board: Board) -> list[bool]:
        numbers = [(-1 - mailbox.rank, 2**62 - 1, 7 + (mailbox.rank == n % 4))[n % 3] for n in range(letters)]
        return [mailbox.alike(number, 30.0, board, "for it") for number in numbers]

    with ThreadPoolExecutor(ranks) as pool:
        expected = [(False, True, n % 4 >= ranks)[n % 3] for n in range(letters)]
        assert list(pool.map(rank, *boxes(ranks))) == [expected] * ranks


def test_who_is_a_little_late_is_waited_for_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleep takes longer than most ranks are late by, and makes this one late for the next letter."""
    (first, second), (board, other) = boxes(2)
    looks: list[float] = []

    def look(seconds: float = 0.0) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            assert second.alike(5, 60.0, other, "for it")

    monkeypatch.setattr(mailboxes, "_let_others_go_on", look)
    monkeypatch.setattr(mailboxes.time, "sleep", look)
    for awake, slept in ((60.0, False), (0.0, True)):
        monkeypatch.setattr(mailboxes, "AWAKE_SECONDS", awake)
        looks.clear()
        assert first.alike(5, 60.0, board, "for it")
        assert [seconds > 0 for seconds in looks] == [slept] * 3


def test_calls_that_differ_are_found_without_waiting() -> None:
    """By whoever comes later at once, by who was there before in a later call; and half an entry is none."""
    memory = memoryview(bytearray(Ledger.bytes(3)))
    first, second, third = (Ledger(memory, rank, 3) for rank in range(3))
    for number in range(3 * CALLS):  # in step, and one that is ahead
        assert first.tell(number) is None
        assert second.tell(number) is None
    assert first.tell(7) is None
    assert second.tell(8) == 0
    assert first.tell(9) == 1
    for number in range(3 * CALLS):
        assert third.tell(number) is None  # what has been overwritten is not compared
    memory = memoryview(bytearray(Ledger.bytes(2)))
    first, second = (Ledger(memory, rank, 2) for rank in range(2))
    second.numbers[second._place(1, 1)] = 5
    second.numbers[second._place(1, 1) + 2] = 1
    assert first.tell(6) is None


def test_letters_that_do_not_come() -> None:
    """Half a letter is none; who has ended or given up is named at once, who is late after the time given."""
    (first, second), (board, other) = boxes(2)
    second.count = 1
    for offset, number in enumerate([6, second._seal(7), 1]):
        second.numbers[second._place(1) + offset] = number
    with pytest.raises(Gone, match="nothing came") as error:
        first.alike(0, 0.2, board, "for a letter")
    assert error.value.rank == 1
    seen = other.read(0)
    assert (seen.other, seen.what) == (1, "for a letter")
    assert 0.2 <= seen.seconds < 10
    other.fail(-1, "an error of its own")
    with pytest.raises(Gone, match="given up"):
        first.alike(0, 60.0, board, "for a letter")
    assert str(board.read(1)) == "failed (forward pass 0, backward pass 0): an error of its own"

    running = subprocess.Popen(["sleep", "60"])
    process = Process(running.pid, Process._stat(running.pid)[1])
    assert process.state() == "runs"
    os.kill(running.pid, signal.SIGSTOP)
    while process.state() == "runs":
        time.sleep(0.01)
    assert process.state() == "is stopped"
    running.kill()
    running.wait()
    assert process.state() == "has ended"
    assert Process(os.getpid(), 1).state() == "has ended"  # another process, of the same number
    (first, _), (board, _) = boxes(2, [Process.mine(), process])
    with pytest.raises(Gone, match="has ended"):
        first.alike(0, 60.0, board, "for a letter")


def test_shared_memory_is_ours_and_leaves_nothing(tmp_path: Path) -> None:
    """No name to guess or to be left behind; what is not the memory that was meant is refused."""
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()
    handle, address = create(64)
    path, _, secret = address.rpartition(":")
    memory = attach(address, 64)
    memory[0] = 7
    assert attach(address, 64)[0] == 7
    for wrong in (f"{path}:{'0' * 32}", f"{path}:no hex", f"{tmp_path}/none:{secret}"):
        with pytest.raises((OSError, ValueError)):
            attach(wrong, 64)
    with pytest.raises(ValueError, match="another size"):
        attach(address, 63)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(handle, 8)
    os.close(handle)
    assert attach_fails(address)
    assert memory[0] == 7
    if before:
        assert not {name for name in set(os.listdir("/dev/shm")) - before if "leetdist" in name}


def attach_fails(address: str) -> bool:
    try:
        attach(address, 64)
    except (OSError, ValueError):
        return True
    return False
