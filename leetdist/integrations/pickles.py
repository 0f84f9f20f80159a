"""What a checkpoint would unpickle, before anything does: the names in its pickles, found without running any.

PyTorch, accelerate and DeepSpeed keep more than tensors in pickles, and load some of them as pickles are loaded: by
calling whatever they name. So a checkpoint's pickles may name only what holds data (KNOWN), or what the caller trusts.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

# How many follow each other in a file of torch.save's older format; then raw numbers do.
PICKLES = 5
# Classes of PyTorch's, numpy's and DeepSpeed's that hold data, and what makes them; beside what PyTorch itself allows
# where it loads weights only.
KNOWN = frozenset(
    {
        "_codecs.encode",
        "datetime.timedelta",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.serialization._get_layout",
    }
)

# Python 3.11.2 pickles a member of an enum as getattr(class, name), which may be called so and with nothing else.
GETATTR = "builtins.getattr", "__builtin__.getattr"
MEMBERS = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": {
        "disabled", "gradients", "max_stage", "optimizer_states", "weights",
    },
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": {
        "TORCH_CHANNELS_LAST", "TORCH_CONTIGUOUS_FORMAT", "TORCH_PRESERVE_FORMAT",
    },
}  # fmt: skip


@cache
def known() -> frozenset[str]:
    from torch._weights_only_unpickler import _get_allowed_globals

    return KNOWN | frozenset(_get_allowed_globals())


def check_pickles(folder: Path, trusted: Collection[str] = ()) -> None:
    """ValueError if a pickle in the folder names what is neither known to hold data nor trusted."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            strange = sorted(set(names_in(path)) - known() - set(trusted))
        except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, *_BROKEN) as error:
            raise ValueError(f"{path} holds a pickle that cannot be read: {error}") from None
        if strange:
            raise ValueError(
                f"{path} would call {', '.join(strange)} when it is loaded, which may run any code. If you know where "
                f"it comes from, name what you trust: --trust {' '.join(strange)}"
            )


def names_in(path: Path) -> Iterator[str]:
    """What the pickles of a file name, as "module.name": a pickle, torch.save's archive, or PyTorch's .distcp."""
    if path.name == ".metadata":
        with path.open("rb") as file:
            found = _named(file)
        yield from found
        for name, begin, length in _objects(path) if known().issuperset(found) else ():
            with path.with_name(name).open("rb") as data:
                data.seek(begin)
                yield from _archive(io.BytesIO(data.read(length)))
    elif path.suffix not in (".distcp", ".safetensors"):
        with path.open("rb") as file:
            head = file.read(2)
            file.seek(0)
            if head == b"PK":
                yield from _archive(file)
            elif head[:1] == b"\x80" or path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin"):
                yield from _named(file)


def _archive(file: IO[bytes]) -> Iterator[str]:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        yield from _named(file)
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.namelist():
            if entry.endswith(".pkl"):
                yield from _named(io.BytesIO(archive.read(entry)))


def _objects(metadata: Path) -> Iterator[tuple[str, int, int]]:
    """Where a distributed checkpoint keeps what is no tensor, and so is unpickled whole: file, offset and length."""
    told = read_metadata(metadata)
    for index, info in (told.storage_data or {}).items():
        if type(told.state_dict_metadata.get(index.fqn)).__name__ != "TensorStorageMetadata":
            yield info.relative_path, info.offset, info.length


def read_metadata(path: Path) -> Any:
    """A distributed checkpoint's .metadata, made of the classes of KNOWN alone."""

    class Metadata(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" in GETATTR:
                return _member
            if f"{module}.{name}" not in known():
                raise pickle.UnpicklingError(f"{module}.{name} has no place in {path}")
            return super().find_class(module, name)

    with path.open("rb") as file:
        return Metadata(file).load()


def _member(of: type, name: str) -> Any:
    if name not in MEMBERS.get(f"{of.__module__}.{of.__qualname__}", ()):
        raise pickle.UnpicklingError(f"{of}.{name} is no member of an enum of a checkpoint's")
    return getattr(of, name)


class _Inert:
    """Stands for everything that a pickle names: takes whatever a pickle does with it, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0

    append = extend = add = update = __call__


def _named(file: IO[bytes]) -> list[str]:
    """The names in a file's pickles, which older versions of torch.save wrote one after the other."""
    found: list[str] = []
    classes: dict[str, type] = {}  # the enums that it names

    def member(*args: Any) -> _Inert:
        if not any(args == (classes.get(of), name) for of, names in MEMBERS.items() for name in names):
            found.append(GETATTR[0])
        return _Inert()

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full in GETATTR:
                return member
            found.append(full)
            return classes.setdefault(full, type(name, (_Inert,), {})) if full in MEMBERS else _Inert

        def persistent_load(self, pid: Any) -> Any:
            return _Inert()

    for _ in range(PICKLES):
        Names(file).load()
        if not file.read(1):
            break
        file.seek(-1, io.SEEK_CUR)
    return found


_BROKEN = (AttributeError, ImportError, IndexError, KeyError, MemoryError, TypeError, UnicodeDecodeError, ValueError)

__all__ = ["check_pickles", "names_in", "read_metadata"]
