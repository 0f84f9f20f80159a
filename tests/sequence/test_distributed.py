"""The operator on real processes over gloo: equal to one device, and failing in words when something is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import leetdist
from helpers import Outcome, free_port, run_ranks, values
from leetdist.sequence.group import resolve
from leetdist.sequence.p2p import PointToPoint
from leetdist.testing.equality import Case, check, standard_cases

CPU = torch.device("cpu")


def check_all(rank: int, cases: list[Case]) -> list[str]:
    transport = resolve(dist.group.WORLD)
    found = [check(case, transport, CPU, seed) for seed, case in enumerate(cases)]
    return [str(difference) for case in found for difference in case]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_one_device(ranks: int) -> None:
    cases = [*standard_cases(CPU), Case(40, 16, 16, initial=True)]
    for found in values(run_ranks(check_all, ranks, cases)):
        assert found == []


def in_subgroups(rank: int) -> list[str]:
    """Two groups of two in one job of four, from a mesh; each with its own sequence."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    with pytest.raises(ValueError, match="1-D DeviceMesh"):
        resolve(mesh)
    transport = resolve(mesh["sp"])
    assert transport.size == 2
    case = Case(300, 16, 16, decay="mixed", tile=32)
    found = check(case, transport, CPU, seed=mesh["dp"].get_local_rank())
    return [str(difference) for difference in found]


class Sent:
    """A send of NCCL's, which counts how often it is asked whether it has left."""

    def __init__(self, left: bool) -> None:
        self.left, self.asked = left, 0

    def is_completed(self) -> bool:
        self.asked += 1
        return self.left


def test_sends_that_have_left_are_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before the first that has not; a host that runs ahead does not ask all of them in every call."""
    monkeypatch.setattr(PointToPoint, "capturing", lambda self: False)
    transport = object.__new__(PointToPoint)
    transport.staged, transport.direct = False, None
    works = [Sent(left) for left in (True, True, False, True, False)]
    transport.pending = [(work, torch.empty(0), 1, "a state") for work in works]  # type: ignore[misc]
    transport.flush()
    assert [work for work, *_ in transport.pending] == works[2:]
    assert [work.asked for work in works] == [1, 1, 1, 0, 0]
    for work in works:
        work.left = True
    transport.flush()
    assert transport.pending == []


def shard_and_gather(rank: int) -> None:
    x = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    local = leetdist.shard_sequence(x, 1, dist.group.WORLD)
    whole = leetdist.gather_sequence(local, -2, dist.group.WORLD)
    assert torch.equal(whole, x)
    (whole * (rank + 1.0)).sum().backward()
    # Each token's gradient is what flowed into it on all ranks, 1 + 2 + 3 + 4, on the rank that holds it.
    held = torch.zeros_like(x)
    leetdist.shard_sequence(held, 1, dist.group.WORLD).fill_(10.0)
    assert torch.equal(x.grad, held)


def with_context(rank: int) -> None:
    x = torch.randn(1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    with leetdist.sequence_parallel(dist.group.WORLD):
        local = leetdist.shard_sequence(x, 2, None)
        o = leetdist.linear_attention(local, local, local)
        o = leetdist.gather_sequence(o, 2, None)
    assert torch.equal(o, leetdist.linear_attention(x, x, x))


def without_numpy(rank: int) -> None:
    """PyTorch installs without it, and so does leetdist."""

    def missing(x: torch.Tensor) -> None:
        raise RuntimeError("Numpy is not available")

    x = torch.randn(1, 2, 128, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "numpy", missing)
        group = dist.new_group()  # whose ranks have agreed on nothing yet
        leetdist.linear_attention(x, x, x, group=group)
        leetdist.shard_batch({"input_ids": torch.zeros(1, 64, dtype=torch.long)}, group)


def groups_shards_context(rank: int) -> list[str]:
    shard_and_gather(rank)
    with_context(rank)
    without_numpy(rank)
    return in_subgroups(rank)


def test_groups_shards_and_context() -> None:
    assert values(run_ranks(groups_shards_context, 4)) == [[]] * 4


def disagree(rank: int, what: str) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    options = {}
    odd = rank == 1
    if what == "dk":
        q, k = (torch.randn(1, 2, 64, 32 if odd else 16) for _ in range(2))
    elif what == "dtype" and odd:
        q, k, v = (x.half() for x in (q, k, v))
    elif what == "scale":
        options["scale"] = 0.5 if odd else 1.0
    elif what == "return_state":
        options["return_state"] = odd
    elif what == "needs_grad" and odd:
        q.requires_grad_()
    elif what == "log_decay" and odd:
        options["log_decay"] = torch.full((2,), 0.5)
    elif what == "tile":
        options["tile"] = 32 if odd else 64
    elif what == "boundaries" and rank == 0:
        q, k, v = (x[:, :, :63] for x in (q, k, v))
    elif what == "initial_state" and odd:
        options["initial_state"] = torch.zeros(1, 2, 16, 16)
    with pytest.MonkeyPatch.context() as patch:
        if what == "backend" and odd:
            patch.setenv("LEETDIST_BACKEND", "triton")
        leetdist.linear_attention(q, k, v, **options, group=dist.group.WORLD)


DISAGREEMENTS = {
    "dk": "rank 1 has 32, rank 0 has 16",
    "dtype": "disagree on dtype: rank 1 has torch.float16",
    "scale": "disagree on scale: rank 1 has 0.5",
    "return_state": "disagree on return_state",
    "needs_grad": "disagree on needs_grad",
    "log_decay": "log_decay must be <= 0",
    "tile": "disagree on tile",
    "backend": "disagree on backend: rank 1 has Triton interpreted by Triton",
    "boundaries": "rank 0 ends at token 63",
    "initial_state": "initial_state is given on the first rank",
}


def disagree_on_everything(rank: int) -> dict[str, str]:
    """The errors that this rank raised, by what was wrong on one of them; in between, all goes on working."""
    errors = {}
    for what in DISAGREEMENTS:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller reads the message
            disagree(rank, what)
        errors[what] = str(caught.value)
        disagree(rank, "nothing")
    return errors


def test_disagreement_is_an_error_on_every_rank() -> None:
    for errors in values(run_ranks(disagree_on_everything, 3)):
        for what, words in DISAGREEMENTS.items():
            assert words in errors[what]


def die(rank: int, victim: int, stage: str) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    group = dist.group.WORLD
    leetdist.linear_attention(q, k, v, group=group).sum().backward()
    if rank == victim and stage == "forward":
        os.kill(os.getpid(), signal.SIGKILL)
    o = leetdist.linear_attention(q, k, v, group=group)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    o.sum().backward()


@pytest.mark.parametrize(("victim", "stage"), [(0, "forward"), (1, "forward"), (3, "backward")])
def test_a_dead_rank_is_named(victim: int, stage: str) -> None:
    """Ranks that need the dead one fail, within the timeout, and say which it is."""
    outcomes = run_ranks(die, 4, victim, stage, timeout_s=10)
    # In the backward pass states travel to the left: whoever is right of the dead rank owes it a message only.
    needing = range(victim) if stage == "backward" else [r for r in range(4) if r != victim]
    for rank in needing:
        assert outcomes[rank].error is not None, f"rank {rank} did not notice"
        named = f"rank {victim} of 4 does not answer" in outcomes[rank].error
        # Rank 0 keeps the store in which the others leave their notes; without it a rank names its neighbour.
        assert named or victim == 0, outcomes[rank].error
        assert "of 4 does not answer" in outcomes[rank].error
    assert outcomes[victim] == Outcome()


def run_verify(ranks: int, *args: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={free_port()}", "-m", "leetdist.launch", "verify", "--device", "cpu", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})


def test_verify_under_torchrun() -> None:
    result = run_verify(2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal, bit for bit" in result.stdout


SABOTAGE = """
import os
if os.environ.get("RANK") == "1":
    from leetdist.testing import equality
    real = equality.compute
    def compute(case, tensors, transport):
        result = real(case, tensors, transport)
        if transport is not None and result["o"].numel():
            result["o"].view(-1)[3] += 1e-3
        return result
    equality.compute = compute
"""


def test_verify_names_what_differs(tmp_path) -> None:
    """One wrong element on one rank is found: tensor, rank, tile, both values; exit code 1."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = run_verify(2, environment={"PYTHONPATH": path})
    assert result.returncode != 0
    assert "o differs on rank 1, token" in result.stdout
    assert "(tile " in result.stdout
    assert "on one device" in result.stdout


ENDING = """
import atexit, weakref

atexit.register(lambda: print("gone" if group() is None else "kept"))  # runs after what is registered later
import torch
import torch.distributed as dist
import leetdist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)

def step():
    x = torch.randn(1, 2, 64, 16, requires_grad=True)
    leetdist.linear_attention(x, x, x, group=dist.group.WORLD, tile=16).sum().backward()

step()
dist.destroy_process_group()
"""


def test_a_destroyed_group_ends_before_python_does() -> None:
    """Its end waits for its threads; a thread that lets go of a tensor after Python's end ends the process."""
    result = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    last = result.stdout.splitlines()[-1:]  # gloo says hello in torch 2.9
    assert (last, result.returncode) == (["gone"], 0), result.stderr


def test_cases_are_fresh() -> None:
    """Other seeds draw other inputs: nothing is compared with a stored result."""
    from leetdist.testing.equality import make_tensors

    case = replace(standard_cases(CPU)[0], tokens=32)
    first, second = (make_tensors(case, CPU, seed).inputs["q"] for seed in (0, 1))
    assert not torch.equal(first, second)
