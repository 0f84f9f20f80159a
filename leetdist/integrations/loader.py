"""A data loader whose batches are dealt to data-parallel ranks and cut for the ranks that share a sequence."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from leetdist.arguments import as_int, check_device
from leetdist.integrations.batches import Batch, checksums, shard_batch
from leetdist.mesh import DATA_NAMES, data_rank, dimensions_of, sequence_group
from leetdist.sequence.agreement import gathered
from leetdist.sequence.group import resolve

if TYPE_CHECKING:
    from leetdist.mesh import Mesh

# How samplers, datasets and their wrappers (torch's, accelerate's, datasets') say that they give a rank its share.
_DEALERS = (
    ("num_replicas", "rank"), ("num_processes", "process_index"), ("world_size", "rank"), ("dp_size", "rank"),
    ("data_parallel_size", "data_parallel_rank"),
)  # fmt: skip
# "state": accelerate's loader that reads on one rank, and sends the others their rows.
_WRAPPED = ("sampler", "batch_sampler", "dataset", "_distributed", "base_dataloader", "_ex_iterable", "state")
# What a DataLoader is made of, besides its dataset and what draws from it.
_OPTIONS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


class ShardedLoader:
    """Wraps a data loader for a (dp, sp) mesh: every rank of a sequence gets its shard of the same rows.

    Each batch of the wrapped loader is one of the whole job: its rows are dealt to the data-parallel ranks in order,
    and each row is cut over the ranks that share it, by `shard_batch`. So the training does not depend on how many
    ranks there are, also when it is resumed on another number. Iterating it goes through one epoch, from where it
    stands.

    Args:
        loader: a DataLoader, of a dataset by index or of an iterable one, or any iterable of dicts of tensors that can
            be started again; its batch size, in rows, is a multiple of the number of data-parallel ranks. Draw its
            rows in an order that is the same on all ranks: an unseeded shuffle is seeded here, by `seed` and the
            epoch, and `set_epoch` of a sampler or dataset is called.
        mesh: as for `shard_batch`.
        seed: of the order.
        device: where the batches go; None leaves them on the CPU.

    Attributes: `epoch`, from 0; `step`, batches taken in this epoch; `state_dict()`, `load_state_dict()`: resume, with
    the state of a loader that has one (torchdata's StatefulDataLoader), else by drawing the first `step` batches again.
    `len()`, steps an epoch, where the loader has a length. `progress` is a line for people.

    Raises:
        ValueError: the loader's sampler, dataset or wrapper deals rows to ranks already; the mesh has no dimension for
            sequences; the rows of a batch do not divide; the data-parallel ranks draw other rows (looked at where an
            epoch begins); or, from `shard_batch`, the ranks' rows differ. Shapes and dtypes are those of `shard_batch`.

    Source: the data-sequence hybrid parallelism of LASP, arXiv 2404.02882: rows are dealt by the data-parallel rank of
    the mesh, not by the rank in the job.

    >>> import torch, leetdist
    >>> rows = [{"input_ids": torch.full((32,), i)} for i in range(6)]
    >>> loader = leetdist.ShardedLoader(torch.utils.data.DataLoader(rows, batch_size=2), None)
    >>> [batch["input_ids"][:, 0].tolist() for batch in loader]
    [[0, 1], [2, 3], [4, 5]]
    >>> loader.progress
    'epoch 1, step 0 of 3'
    """

    def __init__(
        self,
        loader: Iterable[Mapping[str, Any]],
        mesh: Mesh | None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if (dealer := _dealer(loader)) is not None:
            raise ValueError(
                f"loader deals rows to ranks already, by its {dealer}: ShardedLoader would deal each rank's share once "
                "more, and ranks of one sequence would get other rows; give it a loader of the whole job's batches"
            )
        given: Any = loader
        if isinstance(given, str) or not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
            raise ValueError(f"loader must be an iterable of batches, got {type(given).__name__}")
        seed = as_int("seed", seed)
        if isinstance(loader, Iterator):
            raise ValueError("loader must be an iterable that can be started again for each epoch, got an iterator")
        if device is not None:
            check_device(device)
        sequence_group(mesh)  # says what a mesh has to be
        self.mesh, self.seed, self.device = mesh, seed, device
        self.rank, self.ranks = data_rank(mesh)
        self.epoch = self.step = 0
        self.source: Iterable[Mapping[str, Any]] = loader
        self.given = loader
        self._rows: _Rows | None = None
        self._ahead = 0  # batches that the loader leaves out itself, as its own state says
        whole: Any = loader
        by_index = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
        if by_index and whole.batch_sampler is not None:
            # Deal indices, not rows: nobody reads what it does not use.
            self._rows = _Rows(whole.batch_sampler, self.rank, self.ranks)
            options = {name: getattr(whole, name) for name in _OPTIONS if hasattr(whole, name)}
            if not options["num_workers"]:
                options.pop("prefetch_factor", None)
            self.source = DataLoader(whole.dataset, batch_sampler=self._rows, **options)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            self.step += 1
            yield Batch(
                (name, value.to(self.device) if isinstance(value, Tensor) else value)
                for name, value in shard_batch(batch, self.mesh).items()
            )
        if (group := sequence_group(self.mesh)) is not None:  # ranks that have more batches are told so at once
            transport = resolve(group)
            assert transport is not None
            gathered(self.step, transport, "the end of its loader's epoch")
        self.epoch, self.step = self.epoch + 1, 0

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        """This data-parallel rank's rows of each batch from `step` on."""
        if self._rows is not None:
            self._rows.skip, self._rows.drawn = self.step, None
        for part in _parts(self.given):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(self.seed + self.epoch)
        with torch.random.fork_rng(devices=[]):
            # Samplers without a generator draw their order from torch's, when they are asked for their first batch.
            torch.default_generator.manual_seed(self.seed + self.epoch)
            batches = map(_mapping, self.source)
            first = list(islice(batches, 1))
        if self._rows is not None:
            self._check_same_rows(self._rows.drawn)
        elif first:
            self._check_same_rows(checksums(first[0]))
        ahead, self._ahead = self._ahead, 0
        for number, batch in enumerate(chain(first, batches), ahead):
            if self._rows is not None:
                yield batch
            elif number >= self.step:
                yield self._share(batch)

    def _share(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """This data-parallel rank's rows of a batch; what is not of its rows stays whole."""
        if self.ranks == 1:
            return batch
        count = len(batch["input_ids"])
        rows = _deal(count, self.rank, self.ranks)
        ours: dict[str, Any] = {}
        for name, value in batch.items():
            by_row = isinstance(value, Tensor | list | tuple) and getattr(value, "ndim", 1) > 0 and len(value) == count
            ours[name] = value[rows] if by_row and not name.startswith("cu_seq") else value
        return ours

    def _check_same_rows(self, drawn: Any) -> None:
        """ValueError if the ranks have drawn other rows, which only then are the whole job's."""
        for name, dimension in dimensions_of(self.mesh).items():
            if name in DATA_NAMES and hasattr(dimension, "get_group") and dimension.size() > 1:
                transport = resolve(dimension)
                assert transport is not None
                everyone = gathered(drawn, transport, "the rows that an epoch begins with")
                for rank, theirs in enumerate(everyone):
                    if theirs != everyone[0]:
                        raise ValueError(
                            f"the loaders of data-parallel ranks must draw the same rows, in the same order, but those "
                            f"of ranks {rank} and 0 of {name} begin with others: ShardedLoader deals them to the ranks"
                        )

    @property
    def progress(self) -> str:
        try:
            total = f" of {len(self)}"
        except TypeError:  # a stream has no length
            total = ""
        return f"epoch {self.epoch}, step {self.step}{total}"

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "seed": self.seed}
        given: Any = self.given
        if self.step and hasattr(given, "state_dict") and hasattr(given, "load_state_dict"):
            state["loader"] = given.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.step, self.seed = state["epoch"], state["step"], state["seed"]
        given: Any = self.given
        self._ahead = 0
        if "loader" in state and hasattr(given, "load_state_dict"):
            given.load_state_dict(state["loader"])
            self._ahead = self.step


class _Rows(Sampler[list[int]]):
    """One data-parallel rank's share of each batch of indices, from batch `skip` on."""

    def __init__(self, batches: Iterable[list[int]], rank: int, ranks: int) -> None:
        self.batches, self.rank, self.ranks = batches, rank, ranks
        self.skip = 0
        self.drawn: int | None = None
        """A checksum of the first batch's indices, before they are dealt."""

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        for indices in islice(self.batches, self.skip, None):
            indices = list(indices)
            if self.drawn is None:
                self.drawn = zlib.crc32(repr([getattr(i, "item", lambda i=i: i)() for i in indices]).encode())
            yield indices[_deal(len(indices), self.rank, self.ranks)]


def _deal(rows: int, rank: int, ranks: int) -> slice:
    if rows % ranks:
        raise ValueError(
            f"the rows of a batch must be a multiple of the {ranks} data-parallel ranks, got {rows}; the last batch "
            "of an epoch may be short: drop_last=True"
        )
    return slice(rank * rows // ranks, (rank + 1) * rows // ranks)


def _parts(loader: Any) -> Iterator[Any]:
    """The loader and what it draws from, each once."""
    found: list[Any] = []
    waiting = [loader]
    while waiting:
        part = waiting.pop(0)
        if any(part is other for other in found):
            continue
        found.append(part)
        yield part
        if not isinstance(part, list | tuple | dict):
            held = (getattr(part, name, None) for name in _WRAPPED)
            waiting += [x for x in held if x is not None and not isinstance(x, Tensor)]


def _mapping(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise ValueError(f"loader must give mappings from names to tensors, got {type(batch).__name__}")
    return batch


def _dealer(loader: Any) -> str | None:
    """The class of what gives each rank a share of the rows already, if anything in the loader does."""
    for part in _parts(loader):
        for total, mine in _DEALERS:
            count, own = getattr(part, total, None), getattr(part, mine, None)
            if isinstance(count, int) and count > 1 and isinstance(own, int):
                return type(part).__name__
    return None


__all__ = ["ShardedLoader"]
