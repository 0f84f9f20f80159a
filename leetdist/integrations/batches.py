"""Batches of whole sequences, cut for the ranks that share them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from leetdist.engine.problem import check_documents
from leetdist.mesh import data_rank, sequence_group
from leetdist.sequence.group import resolve
from leetdist.sequence.shard import shard_sequence

if TYPE_CHECKING:
    from leetdist.mesh import Mesh
    from leetdist.sequence.group import Group

IGNORED = -100


def shard_batch(
    batch: Mapping[str, Any], mesh: Mesh | None, *, ignore_index: int = IGNORED, check: bool = True
) -> dict[str, Any]:
    """This rank's part of a batch that every rank of a sequence has whole.

    Labels are shifted before they are cut, so that the last token of a shard learns the first one of the next;
    positions are those in the whole sequence. Cut like `shard_sequence`: on the grid of `linear_attention`.

    Args:
        batch: `input_ids` (B, N), and whichever of these there are: `labels` (B, N), as transformers takes them,
            `labels[t] = input_ids[t]`; or `shift_labels` (B, N), `shift_labels[t] = input_ids[t + 1]`;
            `attention_mask` (B, N); `position_ids` (B or 1, N); `cu_seqlens` (documents + 1,), packed documents, B = 1.
            Any other tensor with N at dimension 1 is cut as well; the rest passes unchanged.
        mesh: a (dp, sp) mesh, or the group that shares the sequence; None cuts nothing (but does all the rest).
        ignore_index: the label that does not count.
        check: compare the ranks' batches, by a checksum: a data loader that gives them different ones is an error, not
            a strange loss. Costs one small message a rank, and a copy of the tokens where they are on a GPU.

    Returns:
        the same keys, cut along N, int64; `position_ids` always, from 0 (in each document); `labels` and
        `shift_labels`, both shifted. `cu_seqlens` stays whole: `linear_attention` takes it so on every rank.

    Raises:
        ValueError: `input_ids` is missing or not (B, N), another tensor or `cu_seqlens` does not fit it, or the ranks'
            batches differ.

    Source: shifting before sharding as in Arctic Long Sequence Training, arXiv 2506.13996.

    >>> import torch, leetdist
    >>> batch = {"input_ids": torch.arange(64)[None], "labels": torch.arange(64)[None]}
    >>> parts = leetdist.virtual_ranks(lambda group: leetdist.shard_batch(batch, group), ranks=2)
    >>> [(part["input_ids"][0, -1].item(), part["labels"][0, -1].item()) for part in parts]
    [(31, 32), (63, -100)]
    """
    if not isinstance(tokens := batch.get("input_ids"), Tensor) or tokens.ndim != 2:
        raise ValueError(f"batch must have input_ids of shape (B, N), got {_shown(batch.get('input_ids'))}")
    whole = dict(batch)
    cu_seqlens = whole.pop("cu_seqlens", None)
    for name in ("labels", "shift_labels", "attention_mask"):
        if name in whole and whole[name].shape != tokens.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(tokens.shape)}, got {_shown(whole[name])}"
            )
    if cu_seqlens is not None:
        check_documents(cu_seqlens, *tokens.shape)
    if "shift_labels" not in whole and "labels" in whole:
        shifted = F.pad(whole["labels"], (0, 1), value=ignore_index)[:, 1:]
        if cu_seqlens is not None:  # the last token of a document has no next one
            shifted[:, cu_seqlens[1:].long() - 1] = ignore_index
        whole["shift_labels"] = shifted
    if "shift_labels" in whole:
        whole["labels"] = whole["shift_labels"]
    if "position_ids" not in whole:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if cu_seqlens is not None:
            starts = cu_seqlens.to(tokens.device).long()
            positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
        whole["position_ids"] = positions[None]

    group = sequence_group(mesh)
    if check and group is not None:
        _check_same(whole, group)
    for name, value in whole.items():
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == tokens.shape[1]:
            # Contiguous: transformers' own loss views its labels as one row.
            whole[name] = (value if group is None else shard_sequence(value, 1, group)).contiguous()
    if cu_seqlens is not None:
        whole["cu_seqlens"] = cu_seqlens
    return whole


class ShardedLoader:
    """Wraps a data loader for a (dp, sp) mesh: every rank of a sequence gets its shard of the same rows.

    Each batch of the wrapped loader is one of the whole job: its rows are dealt to the data-parallel ranks in order,
    and each row is cut over the ranks that share it, by `shard_batch`. So the training does not depend on how many
    ranks there are, also when it is resumed on another number. Iterating it goes through one epoch, from where it
    stands.

    Args:
        loader: a DataLoader, or any iterable of dicts of tensors that can be started again; its batch size, in rows,
            is a multiple of the number of data-parallel ranks. Draw its rows in an order that is the same on all
            ranks: an unseeded shuffle is seeded here, by `seed` and the epoch.
        mesh: as for `shard_batch`.
        seed: of the order.
        device: where the batches go; None leaves them on the CPU.

    Attributes: `epoch`, from 0; `step`, batches taken in this epoch; `state_dict()`, `load_state_dict()`: resume.
    `len()`, steps an epoch. `progress` is a line for people.

    Raises:
        ValueError: the rows of a batch do not divide, or, from `shard_batch`, the ranks' rows differ. Shapes and dtypes
            are those of `shard_batch`.

    Source: the loader that INTEGRATION of this library measured: data-parallel rank = the mesh's, not the job's.

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
        self.mesh, self.seed, self.device = mesh, seed, device
        self.rank, self.ranks = data_rank(mesh)
        self.epoch = self.step = 0
        self.source: Iterable[Mapping[str, Any]] = loader
        self._rows: _Rows | None = None
        if isinstance(loader, DataLoader) and isinstance(loader.batch_sampler, Sampler):
            # Deal indices, not rows: nobody reads what it does not use.
            self._rows = _Rows(loader.batch_sampler, self.rank, self.ranks)
            kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
            options = {name: getattr(loader, name) for name in kept}
            self.source = DataLoader(loader.dataset, batch_sampler=self._rows, **options)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            self.step += 1
            yield {
                name: value.to(self.device) if isinstance(value, Tensor) else value
                for name, value in shard_batch(batch, self.mesh).items()
            }
        self.epoch, self.step = self.epoch + 1, 0

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        """This data-parallel rank's rows of each batch from `step` on."""
        if self._rows is not None:
            self._rows.skip = self.step
        if isinstance(generator := getattr(self.source, "generator", None), torch.Generator):
            generator.manual_seed(self.seed + self.epoch)
        with torch.random.fork_rng(devices=[]):
            # Samplers without a generator draw their order from torch's, when they are asked for their first batch.
            torch.default_generator.manual_seed(self.seed + self.epoch)
            batches = iter(self.source)
            first = list(islice(batches, 1))
        for number, batch in enumerate(chain(first, batches)):
            if self._rows is not None:
                yield batch
            elif number >= self.step:
                rows = _deal(len(batch["input_ids"]), self.rank, self.ranks)
                yield {k: v[rows] if k != "cu_seqlens" else v for k, v in batch.items()}

    @property
    def progress(self) -> str:
        total = f" of {len(self)}" if hasattr(self.source, "__len__") else ""
        return f"epoch {self.epoch}, step {self.step}{total}"

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.step, self.seed = state["epoch"], state["step"], state["seed"]


class _Rows(Sampler[list[int]]):
    """One data-parallel rank's share of each batch of indices, from batch `skip` on."""

    def __init__(self, batches: Sampler[list[int]], rank: int, ranks: int) -> None:
        self.batches, self.rank, self.ranks = batches, rank, ranks
        self.skip = 0

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        for indices in islice(self.batches, self.skip, None):
            yield list(indices)[_deal(len(indices), self.rank, self.ranks)]


def _deal(rows: int, rank: int, ranks: int) -> slice:
    if rows % ranks:
        raise ValueError(
            f"the rows of a batch must be a multiple of the {ranks} data-parallel ranks, got {rows}; the last batch "
            "of an epoch may be short: drop_last=True"
        )
    return slice(rank * rows // ranks, (rank + 1) * rows // ranks)


def _check_same(batch: Mapping[str, Any], group: Group) -> None:
    """ValueError on every rank if the ranks of the group have different tensors."""
    transport = resolve(group)
    assert transport is not None
    mine = {name: (tuple(x.shape), _checksum(x)) for name, x in batch.items() if isinstance(x, Tensor)}
    everyone = transport.gather_objects(mine, "checksums of the batch")
    for rank, theirs in enumerate(everyone):
        names = sorted(name for name in {**theirs, **everyone[0]} if theirs.get(name) != everyone[0].get(name))
        if names:
            raise ValueError(
                f"the ranks that share a sequence must get the same batch, but rank {rank} and rank 0 differ in "
                f"{', '.join(names)}; a data loader must deal rows by the data-parallel rank alone, as "
                "leetdist.ShardedLoader does"
            )


def _checksum(x: Tensor) -> int:
    bits = x.detach().contiguous().reshape(-1).view(torch.uint8)
    data = bytearray(bits.numel())
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(bits)
    return zlib.crc32(data)


def _shown(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


__all__ = ["ShardedLoader", "shard_batch"]
