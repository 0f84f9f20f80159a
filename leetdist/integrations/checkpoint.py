"""Checkpoints that are whole or not there: written beside, then renamed; with a checksum of every file, checked before
anything is loaded. Nothing in them is unpickled but what holds data (leetdist.integrations.pickles)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from leetdist.integrations.pickles import check_pickles, read_metadata
from leetdist.sequence.group import resolve
from leetdist.sequence.site import warn

_NAME = re.compile(r"step-(\d{8})")
MANIFEST, FORMAT = "leetdist.json", "leetdist.checkpoint/1"
_held: dict[Path, int] = {}


class CheckpointError(RuntimeError):
    """A folder that another run uses, or another rank's error."""


def write_atomically(
    folder: Path | str,
    step: int,
    write: Callable[[Path], object],
    *,
    keep: int = 2,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """`folder/step-<step>` from what `write(path)` puts into an empty folder; all ranks call this together.

    A job that is killed at any moment leaves whole checkpoints only: the new one gets its name after every rank has
    written and the files, with their checksums, are on disk. Only the newest `keep` stay. `folder` is one that all
    ranks see. about: plain values that `about` gives back. An error of one rank is an error on all of them.
    """
    folder, (rank, ranks) = Path(folder), _place()
    done, beside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    with sole_user(folder):
        with _everywhere("making room for a checkpoint"):
            if rank == 0:
                for left_over in folder.glob("step-*.part"):
                    shutil.rmtree(left_over)
                beside.mkdir(parents=True)
        with _everywhere("writing a checkpoint"):
            write(beside)
        with _everywhere("reading what was written"):
            files = _files(beside)
            sums = {name: _checksum(beside / name) for name in files[rank::ranks]}
        everyone = _gather(sums, "the checksums of the checkpoint's files")
        with _everywhere("naming the checkpoint"):
            if rank == 0:
                sums = {name: told for theirs in everyone for name, told in theirs.items()}
                _write_manifest(beside, {"format": FORMAT, "step": step, "files": sums, "about": dict(about or {})})
                for path in [*beside.rglob("*"), beside]:
                    _to_disk(path)
                if done.exists():
                    shutil.rmtree(done)
                beside.rename(done)
                _to_disk(folder)
                for _, path in sorted(_checkpoints(folder))[:-keep]:
                    shutil.rmtree(path)
    return done


def latest(folder: Path | str, *, together: bool = False) -> tuple[int, Path] | None:
    """The step and the path of the newest checkpoint that is whole; damaged ones are passed over, with a warning.

    together: all ranks call this, read a share of the files each, and come to the same end.
    """
    rank, ranks = _place() if together else (0, 1)
    found = sorted(_checkpoints(Path(folder)), reverse=True)
    if together:
        found = [(step, Path(folder) / f"step-{step:08d}") for step in _gather([s for s, _ in found], "checkpoints")[0]]
    for step, path in found:
        problem = damage(path, share=(rank, ranks))
        if together:
            problem = next((p for p in _gather(problem, "whether the checkpoint is whole") if p), None)
        if problem is None:
            return step, path
        if rank == 0:
            warn(f"{problem}: passed over for the checkpoint before it")
    return None


def damage(path: Path | str, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, by the checksums that were written with it; None if it is whole. share: number
    and count of those who check a part of the files each."""
    path = Path(path)
    try:
        told = _manifest(path)
    except ValueError as error:
        return f"the checkpoint {path} is damaged: {error}"
    if told is None:
        warn(f"the checkpoint {path} has no checksums (no {MANIFEST}): it cannot be checked")
        return None
    for name, expected in sorted(told["files"].items())[share[0] :: share[1]]:
        try:
            if _checksum(path / name) != expected:
                return f"the checkpoint {path} is damaged: {name} is not what was written"
        except OSError as error:
            return f"the checkpoint {path} is damaged: {name} cannot be read ({error.strerror})"
    return None


def about(path: Path | str) -> dict[str, Any]:
    """What was given to `write_atomically` as `about`."""
    told: dict[str, Any] = (_manifest(Path(path)) or {}).get("about", {})
    return told


def save(folder: Path | str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **extra: Any) -> Path:
    """A checkpoint of a model under DDP, FSDP2 or neither; any of them loads it, on any number of ranks.

    extra: plain values, the same on all ranks (one rank's are kept), such as `loader=loader.state_dict()`. (DeepSpeed's
    engines have a checkpoint of their own.)
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_state

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "extra": json.dumps({"step": step, **extra})}
    return write_atomically(folder, step, lambda path: save_state(state, checkpoint_id=path))


def load(path: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads in place what `save` wrote; returns its `extra`, with `step`. All ranks call this together.

    Raises ValueError, on every rank, for a checkpoint that is damaged, or that would unpickle more than data.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_state

    check(path)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "extra": ""}
    load_state(state, storage_reader=_reader(Path(path)))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    extra: dict[str, Any] = json.loads(state["extra"])
    return extra


def check(path: Path | str, trusted: Collection[str] = ()) -> None:
    """ValueError, on every rank, unless the checkpoint is whole and its pickles name only data, or what is `trusted`.
    All ranks call this together, before whatever loads it."""
    rank, ranks = _place()
    problem = damage(path, share=(rank, ranks))
    if problem is None and rank == 0:
        try:
            check_pickles(Path(path), trusted)
        except ValueError as error:
            problem = str(error)
    for words in _gather(problem, "whether the checkpoint may be loaded"):
        if words:
            raise ValueError(words)


@contextmanager
def sole_user(folder: Path | str) -> Iterator[None]:
    """This job alone writes into the folder while inside: CheckpointError, on every rank, if another job does. The lock
    is the first rank's process's, and ends with it. All ranks enter together; a rank may, inside, enter again."""
    lock = Path(folder).resolve() / ".lock"
    mine = _place()[0] == 0 and lock not in _held
    with _everywhere("locking the folder"):
        if mine:
            lock.parent.mkdir(parents=True, exist_ok=True)
            _held[lock] = _lock(lock)
    try:
        yield
    finally:
        if mine:
            lock.unlink(missing_ok=True)  # before others can lock it
            os.close(_held.pop(lock))


def _lock(path: Path) -> int:
    """A descriptor of the file, locked for this process (not for its children, who would keep it)."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 100, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise CheckpointError(
                f"another run uses {path.parent}: process {holder}; give each run a folder of its own"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                return handle
        os.close(handle)  # whoever held it has ended in between, and removed it


def _reader(path: Path) -> Any:
    """PyTorch's reader of distributed checkpoints, whose metadata may name data alone."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = read_metadata(path / ".metadata")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


def _manifest(path: Path) -> dict[str, Any] | None:
    """What the checkpoint says of itself; None if it has no manifest, ValueError for a damaged one."""
    try:
        told = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(told, dict) or told.pop("sha256", None) != _digest(told):
        raise ValueError(f"{MANIFEST} does not fit its own checksum")
    if told["format"] != FORMAT:
        raise ValueError(f"its format is {told['format']!r}, wanted {FORMAT!r}")
    return told


def _write_manifest(path: Path, told: dict[str, Any]) -> None:
    (path / MANIFEST).write_text(json.dumps({**told, "sha256": _digest(told)}, indent=1, sort_keys=True))


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> list[int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
        return [file.tell(), digest.hexdigest()]


def _files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gather(mine: Any, what: str) -> list[Any]:
    """Every rank's value, on every rank; waits for as long as the job's own barrier does."""
    if _place()[1] == 1:
        return [mine]
    dist.barrier()
    transport = resolve(dist.group.WORLD)
    assert transport is not None
    with transport.call("exchange"):
        return transport.gather_objects(mine, what)


@contextmanager
def _everywhere(what: str) -> Iterator[None]:
    """What is done inside is done on every rank when this returns, or an error on every rank."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told = _gather(None if failed is None else f"{type(failed).__name__}: {failed}", what)
    if failed is not None:
        raise failed
    for rank, words in enumerate(told):
        if words:
            raise CheckpointError(f"rank {rank} failed in {what}: {words}")


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["CheckpointError", "about", "check", "damage", "latest", "load", "save", "sole_user", "write_atomically"]
