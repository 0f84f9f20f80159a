"""Checkpoints: whole or not there, and a training that goes on as if nothing had happened, on any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.integrations import checkpoint

pytest.importorskip("accelerate")

ARGUMENTS = [
    "--tokens",
    "160",
    "--batch",
    "2",
    "--lr",
    "0.002",
    "--steps",
    "9",
    "--save-every",
    "3",
    "--warmup",
    "2",
    "--resume",
]


def train(rank: int, out: Path, sequence: int, *more: str, kill: str | None = None) -> None:
    from leetdist.launch.train import main

    torch.set_num_threads(1)
    if kill is not None and rank == 0:
        to_disk = checkpoint._to_disk

        def killed(path: Path) -> None:
            if kill in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            to_disk(path)

        checkpoint._to_disk = killed
    main([*ARGUMENTS, "--text", __file__, "--out", str(out), "--sequence-parallel", str(sequence), *more])


def train_killed(rank: int, out: Path, sequence: int) -> None:
    """SIGKILL for the first rank in the middle of the second checkpoint."""
    train(rank, out, sequence, kill="step-00000006.part")


def losses(out: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def run(ranks: int, out: Path, sequence: int, *more: str) -> None:
    values(run_ranks(train, ranks, out, sequence, *more, frameworks=True))


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    run(2, tmp_path / "straight", 2)
    expected = losses(tmp_path / "straight")
    assert list(expected) == list(range(1, 10))
    assert expected[9] < expected[1]

    outcomes = run_ranks(train_killed, 2, tmp_path / "killed", 2, frameworks=True)
    assert not outcomes[0].ended, "rank 0 was to be killed"
    assert [path.name for path in (tmp_path / "killed").glob("step-*[0-9]")] == ["step-00000003"]
    assert list((tmp_path / "killed").glob("*.part")), "the kill was to come in the middle of a checkpoint"
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "killed", tmp_path / name)

    run(2, tmp_path / "killed", 2)
    assert losses(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").glob("*.part"))

    # Other numbers of ranks add up in another order, but see the same data, from the same state.
    run(1, tmp_path / "one", 1, "--micro-batch", "2")
    run(4, tmp_path / "four", 2)
    for name in ("one", "four"):
        found = losses(tmp_path / name)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def train_fsdp2(rank: int, out: Path, sequence: int) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # On the CPU, accelerate takes DDP instead: let it think that this is a GPU.
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    train(rank, out, sequence, "--fsdp", "--precision", "no")


def test_fsdp2_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    from leetdist.launch.loading import load_language_model

    values(run_ranks(train_fsdp2, 2, tmp_path, 2, frameworks=True))
    expected = losses(tmp_path)
    assert (tmp_path / "step-00000009" / "pytorch_model_fsdp_0").is_dir()
    shutil.rmtree(tmp_path / "step-00000009")
    values(run_ranks(train_fsdp2, 4, tmp_path, 2, frameworks=True))
    assert list(losses(tmp_path)) == list(expected)
    assert list(losses(tmp_path).values()) == pytest.approx(list(expected.values()), rel=1e-5)
    # `generate` takes the whole model out of it.
    load_language_model(tmp_path, torch.device("cpu"), torch.float32)


def steps(engine: Any, mesh: Any, first: int, last: int) -> None:
    from test_training import forward_backward, loader_of

    loader = loader_of(mesh)
    loader.load_state_dict({"epoch": 0, "step": first, "seed": 0})
    for batch in loader:
        forward_backward(engine, batch, mesh)
        engine.step()
        if loader.step == last:
            break


def ddp_saves(rank: int, folder: Path) -> dict[str, Tensor]:
    from test_training import ddp

    mesh = leetdist.device_mesh(sequence=2)
    engine = ddp(mesh)
    steps(engine, mesh, 0, 2)
    checkpoint.save(folder, 2, engine.model, engine.optimizer, note="two steps")
    steps(engine, mesh, 2, 3)
    return {name: p.detach() for name, p in engine.model.module.named_parameters()}


def fsdp2_goes_on(rank: int, folder: Path) -> dict[str, Tensor]:
    from test_training import fsdp2

    mesh = leetdist.device_mesh(sequence=2)
    engine = fsdp2(mesh)
    newest = checkpoint.latest(folder)
    assert newest is not None
    extra = checkpoint.load(newest[1], engine.model, engine.optimizer)
    assert (newest[0], extra) == (2, {"step": 2, "note": "two steps"})
    steps(engine, mesh, 2, 3)
    return {name: p.full_tensor().detach() for name, p in engine.model.named_parameters()}


def test_ddp_on_two_ranks_goes_on_as_fsdp2_on_four(tmp_path: Path) -> None:
    expected = values(run_ranks(ddp_saves, 2, tmp_path, frameworks=True))[0]
    found = values(run_ranks(fsdp2_goes_on, 4, tmp_path, frameworks=True))[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_not_whole_is_no_checkpoint(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        (path / "weights").write_text("whole")

    def fail(path: Path) -> None:
        write(path)
        raise OSError("disk full")

    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 15):
        checkpoint.write_atomically(tmp_path, step, write, keep=2)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(tmp_path, 20, fail)
    assert checkpoint.latest(tmp_path) == (15, tmp_path / "step-00000015")
    checkpoint.write_atomically(tmp_path, 25, write)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000015", "step-00000025"]
