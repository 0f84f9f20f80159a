"""Batches of whole sequences, cut for the ranks that share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leetdist.arguments import as_bool, as_int
from leetdist.engine.checks import check_documents
from leetdist.integrations.documents import take_documents
from leetdist.mesh import sequence_group
from leetdist.sequence.agreement import checksum, gathered
from leetdist.sequence.group import resolve
from leetdist.sequence.shard import shard_sequence

if TYPE_CHECKING:
    from leetdist.mesh import Mesh
    from leetdist.sequence.group import Group

IGNORED = -100
WHOLE_NUMBERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8


class Batch(dict[str, Any]):
    """What `shard_batch` returns: a dict that says why there are no labels in it."""

    def __missing__(self, name: str) -> Any:
        hint = ""
        if name in ("labels", "shift_labels"):
            hint = (
                ": the batch had neither labels nor shift_labels when it was cut. Put labels (B, N) beside input_ids, "
                "for a language model the same tokens, with -100 where nothing is to be learnt"
            )
        raise KeyError(f"{name}{hint}")


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
            Documents are told as well by `position_ids` that start anew, and by what collators make: `cu_seq_lens_q`,
            `cu_seq_lens_k` and lengths of theirs, `seq_idx` (1, N). Any other tensor with N at dimension 1 is cut as
            well; the rest passes unchanged.
        mesh: a (dp, sp) mesh, or the group that shares the sequence; None cuts nothing (but does all the rest).
        ignore_index: the label that does not count.
        check: compare the ranks' batches, by a checksum: a data loader that gives them different ones is an error, not
            a strange loss. Costs one small message a rank, and a copy of the tokens where they are on a GPU.

    Returns:
        the same keys, cut along N, int64; `position_ids` always, from 0 (in each document); `labels` and
        `shift_labels`, both shifted. `cu_seqlens`, if the row holds several documents, by this name alone, stays whole:
        `linear_attention` takes it so on every rank.

    Raises:
        ValueError: `input_ids` is missing or not (B, N), another tensor or `cu_seqlens` does not fit it, what tells of
            documents disagrees or tells of several in one of several rows, or the ranks' batches differ.

    Source: shifting before sharding as in Arctic Long Sequence Training, arXiv 2506.13996.

    >>> import torch, leetdist
    >>> batch = {"input_ids": torch.arange(64)[None], "labels": torch.arange(64)[None]}
    >>> parts = leetdist.virtual_ranks(lambda group: leetdist.shard_batch(batch, group), ranks=2)
    >>> [(part["input_ids"][0, -1].item(), part["labels"][0, -1].item()) for part in parts]
    [(31, 32), (63, -100)]
    """
    check = as_bool("check", check)
    group = sequence_group(mesh)
    asked = check and group is not None
    try:
        whole, cu_seqlens = _whole(batch, ignore_index)
    except ValueError as error:
        if asked:
            _gathered(error, group)
        raise
    if asked:
        _check_same(whole, group)
    tokens = whole["input_ids"]
    for name, value in whole.items():
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == tokens.shape[1]:
            # Contiguous: transformers' own loss views its labels as one row.
            whole[name] = (value if group is None else shard_sequence(value, 1, group)).contiguous()
    if cu_seqlens is not None:
        whole["cu_seqlens"] = cu_seqlens
    return whole


def _whole(batch: Mapping[str, Any], ignore_index: int) -> tuple[Batch, Tensor | None]:
    """The batch with shifted labels and positions, once it is checked, and the documents in its row."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch must be a mapping from names to tensors, got {type(batch).__name__}")
    ignore_index = as_int("ignore_index", ignore_index)
    if not isinstance(tokens := batch.get("input_ids"), Tensor) or tokens.ndim != 2:
        raise ValueError(f"batch must have input_ids of shape (B, N), got {_shown(batch.get('input_ids'))}")
    if not tokens.numel():
        raise ValueError(f"input_ids must hold at least one token, got shape {tuple(tokens.shape)}")
    whole = Batch(batch)
    for name in ("labels", "shift_labels", "attention_mask"):
        if name in whole and (not isinstance(whole[name], Tensor) or whole[name].shape != tokens.shape):
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(tokens.shape)}, got {_shown(whole[name])}"
            )
    for name in ("input_ids", "labels", "shift_labels"):
        if name in whole and whole[name].dtype not in WHOLE_NUMBERS:
            raise ValueError(f"{name} must be whole numbers, int64 or shorter, got {whole[name].dtype}")
    cu_seqlens = take_documents(whole)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, *tokens.shape)
    if "shift_labels" not in whole and "labels" in whole:
        shifted = F.pad(whole["labels"], (0, 1), value=ignore_index)[:, 1:]
        if cu_seqlens is not None:  # the last token of a document has no next one
            shifted[:, cu_seqlens[1:].long().to(shifted.device) - 1] = ignore_index
        whole["shift_labels"] = shifted
    if "shift_labels" in whole:
        whole["labels"] = whole["shift_labels"]
    if "position_ids" not in whole:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if cu_seqlens is not None:
            starts = cu_seqlens.to(tokens.device).long()
            positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
        whole["position_ids"] = positions[None]
    return whole, cu_seqlens


def _gathered(mine: Any, group: Group | None) -> list[Any]:
    transport = resolve(group)
    assert transport is not None
    return gathered(mine, transport, "checksums of the batch")


def _check_same(batch: Mapping[str, Any], group: Group | None) -> None:
    """ValueError on every rank if the ranks of the group have different tensors."""
    everyone = _gathered(checksums(batch), group)
    for rank, theirs in enumerate(everyone):
        names = sorted(name for name in {**theirs, **everyone[0]} if theirs.get(name) != everyone[0].get(name))
        if names:
            raise ValueError(
                f"the ranks that share a sequence must get the same batch, but rank {rank} and rank 0 differ in "
                f"{', '.join(names)}; a data loader must deal rows by the data-parallel rank alone, as "
                "leetdist.ShardedLoader does"
            )


def checksums(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> shape and checksum of each tensor."""
    return {name: (tuple(x.shape), checksum(x)) for name, x in batch.items() if isinstance(x, Tensor)}


def _shown(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


__all__ = ["Batch", "checksums", "shard_batch"]
