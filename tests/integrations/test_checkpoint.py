"""Checkpoints: whole or not there, and a training that goes on as if nothing had happened, on any number of ranks."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
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
    from test_training import ddp, model_of

    mesh = leetdist.device_mesh(sequence=2)
    engine = ddp(partial(model_of, "own"), mesh)
    steps(engine, mesh, 0, 2)
    checkpoint.save(folder, 2, engine.model, engine.optimizer, note="two steps")
    steps(engine, mesh, 2, 3)
    return {name: p.detach() for name, p in engine.model.module.named_parameters()}


def fsdp2_goes_on(rank: int, folder: Path) -> dict[str, Tensor]:
    from test_training import fsdp2, model_of

    mesh = leetdist.device_mesh(sequence=2)
    engine = fsdp2(partial(model_of, "own"), mesh)
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


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_damaged_checkpoint_costs_one(tmp_path: Path) -> None:
    """Every file of it, cut anywhere or with a bit flipped anywhere, is noticed, and the one before is taken."""

    def write(path: Path) -> None:
        (path / "part").mkdir()
        (path / "part" / "weights").write_bytes(bytes(range(64)))
        (path / "optimizer").write_bytes(b"moments")

    checkpoint.write_atomically(tmp_path, 1, write, about={"lr": 0.5})
    newest = checkpoint.write_atomically(tmp_path, 2, write)
    assert checkpoint.latest(tmp_path) == (2, newest)
    assert checkpoint.about(tmp_path / "step-00000001") == {"lr": 0.5}
    for name in ("part/weights", "optimizer", checkpoint.MANIFEST):
        path, whole = newest / name, (newest / name).read_bytes()
        for damaged in [
            *(whole[:length] for length in range(len(whole))),
            *(whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :] for at in range(len(whole))),
        ]:
            path.write_bytes(damaged)
            with pytest.warns(UserWarning, match="step-00000002 is damaged.*passed over"):
                assert checkpoint.latest(tmp_path) == (1, tmp_path / "step-00000001"), (name, damaged)
        path.write_bytes(whole)
    (newest / "optimizer").unlink()
    with pytest.raises(ValueError, match="optimizer cannot be read"):
        checkpoint.check(newest)


def resumed(rank: int, out: Path, *more: str) -> str:
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")
            patch.setattr("leetdist.launch.commands.LATER_SECONDS", 0.0)  # here all ranks are heard
            train(rank, out, 2, *more)
    except SystemExit as error:
        return str(error)
    return ""


def test_resuming_what_is_damaged_or_another_training(tmp_path: Path) -> None:
    """A flipped bit and a cut line cost one checkpoint; another text or batch is refused by name."""
    run(2, tmp_path, 2)
    expected = losses(tmp_path)
    flip(tmp_path / "step-00000009" / "model.safetensors", -5, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert values(run_ranks(resumed, 2, tmp_path, frameworks=True)) == ["", ""]
    assert losses(tmp_path) == expected
    assert checkpoint.latest(tmp_path) == (9, tmp_path / "step-00000009")
    for more, words in (
        (("--batch", "4"), "--batch: 4; in step-00000009: 2"),
        (("--text", os.__file__), "is of another training. --text: "),
        (("--seed", "1", "--changed", "batch"), "--seed: 1; in step-00000009: 0"),
        (("--changed", "bach"), "--changed takes text, "),
    ):
        for said in values(run_ranks(resumed, 2, tmp_path, *more, frameworks=True)):
            assert words in said
    assert values(run_ranks(resumed, 2, tmp_path, "--batch", "4", "--changed", "batch", frameworks=True)) == ["", ""]


def test_one_run_a_folder(tmp_path: Path) -> None:
    """Another process is refused while this one has the folder; the lock ends with the process, not its children."""
    holder = (
        "import os, sys, time\nfrom leetdist.integrations.checkpoint import sole_user\n"
        "with sole_user(sys.argv[1]):\n    if os.fork():\n        print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(checkpoint.CheckpointError, match=f"another run uses .*: process {other.pid} on"):
            checkpoint.write_atomically(tmp_path, 1, lambda path: None)
        other.kill()
        other.wait()
        with checkpoint.sole_user(tmp_path), checkpoint.sole_user(tmp_path):
            checkpoint.write_atomically(tmp_path, 1, lambda path: None)
            assert (tmp_path / ".lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


class Harm:
    """What a pickle can call: here it only leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_nothing_strange_is_unpickled(tmp_path: Path) -> None:
    from leetdist.integrations.pickles import check_pickles, names_in
    from leetdist.launch.loading import load_language_model

    mark = tmp_path / "harm"
    harm = {"weights": torch.zeros(2), "more": Harm(mark)}
    for name in ("new.bin", "old.pt", "two.pkl", "plain"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        if name in ("new.bin", "old.pt"):
            torch.save(harm, folder / name, _use_new_zipfile_serialization=name == "new.bin")
        else:
            (folder / name).write_bytes((pickle.dumps(1) if name == "two.pkl" else b"") + pickle.dumps(harm["more"]))
        assert f"{os.mkdir.__module__}.mkdir" in set(names_in(folder / name))
        with pytest.raises(ValueError, match=r"would call posix\.mkdir .*--trust posix\.mkdir"):
            check_pickles(folder)
        check_pickles(folder, ["posix.mkdir"])

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save(tmp_path / "run", 1, model, optimizer, note="data")
    assert checkpoint.load(path, model, optimizer)["note"] == "data"
    (path / checkpoint.MANIFEST).unlink()  # somebody else's may have another, or none
    (path / ".metadata").write_bytes(pickle.dumps(Harm(mark)))
    refused = pytest.raises(ValueError, match=r"would call posix\.mkdir")
    with pytest.warns(UserWarning, match="no checksums") as told, refused:
        checkpoint.load(path, model, optimizer)
    assert told[0].filename == __file__
    (tmp_path / "shown" / "pytorch_model_fsdp_0").mkdir(parents=True)
    shutil.copy(path / ".metadata", tmp_path / "shown" / "pytorch_model_fsdp_0")
    with pytest.raises(ValueError, match=r"would call posix\.mkdir"):
        load_language_model(tmp_path / "shown", torch.device("cpu"), torch.float32)
    assert not mark.exists()


class Got:
    """What Python 3.11.2 makes of a member of an enum, or what somebody makes of that."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> Any:
        return getattr, self.args


@pytest.mark.parametrize("protocol", [2, 4])  # torch.save's, and a distributed checkpoint's
def test_getattr_is_for_members_of_enums(tmp_path: Path, protocol: int) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as FORMATS

    from leetdist.integrations.pickles import check_pickles, read_metadata

    path, contiguous = tmp_path / ".metadata", FORMATS.TORCH_CONTIGUOUS_FORMAT
    path.write_bytes(pickle.dumps(Got(FORMATS, contiguous.name), protocol))
    assert read_metadata(path) is contiguous
    path.rename(tmp_path / "state.pkl")
    check_pickles(tmp_path)
    inner = Got(FORMATS, contiguous.name)
    for wrong in (Got(FORMATS, "mro"), Got(FORMATS, "__init__"), Got(inner, "name"), Got(torch.Size, "numel"), Got(1)):
        (tmp_path / "state.pkl").write_bytes(pickle.dumps(wrong, protocol))
        with pytest.raises(ValueError, match=r"would call builtins\.getattr"):
            check_pickles(tmp_path)
    path.write_bytes(pickle.dumps(Got(FORMATS, "mro"), protocol))
    with pytest.raises(pickle.UnpicklingError, match="mro is no member"):
        read_metadata(path)


def write_fails(rank: int, folder: Path) -> str:
    def write(path: Path) -> None:
        if rank == 1:
            raise OSError("disk full")

    try:
        checkpoint.write_atomically(folder, 1, write)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "written"


def test_one_rank_that_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    told = "CheckpointError: rank 1 failed in writing a checkpoint: OSError: disk full"
    assert values(run_ranks(write_fails, 3, tmp_path)) == [told, "OSError: disk full", told]
