"""Packed documents: one form, `cu_seqlens`, of the several in which collators and models tell where they begin."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.sequence.agreement import gathered
from leetdist.sequence.group import resolve
from leetdist.sequence.shard import gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

# What transformers' and TRL's collators call the offsets, and what says nothing that offsets do not.
OFFSETS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens")
LENGTHS = ("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "max_seqlen")


def take_documents(batch: dict[str, Any]) -> Tensor | None:
    """`cu_seqlens` of a whole batch by whichever names it has, which are taken out of it; None for one document a row.

    Also told by `seq_idx` (B, N), and by `position_ids` that start anew (where `attention_mask`, if there, keeps).
    """
    tokens = batch["input_ids"]
    told = _offsets(batch)
    seq_idx, positions = batch.pop("seq_idx", None), batch.get("position_ids")
    for name, x in (("seq_idx", seq_idx), ("position_ids", positions)):
        if x is not None and (x.ndim != 2 or x.shape[1] != tokens.shape[1] or x.shape[0] not in (1, len(tokens))):
            raise ValueError(f"{name} must be (B or 1, N) for input_ids of {_shown(tokens)}, got {_shown(x)}")
    if seq_idx is not None:
        told["seq_idx"] = _one_row(seq_idx.diff(dim=1) != 0, len(tokens), "seq_idx")
    if positions is not None:
        starts = starts_of(positions, batch.get("attention_mask"))
        if told or bool(starts.any()):
            told["position_ids"] = _one_row(starts, len(tokens), "position_ids")
    return _agreed(told)


def take_offsets(call: dict[str, Any]) -> Tensor | None:
    """`cu_seqlens` of a call by whichever names it has, which are taken out of it; None if it has none."""
    return _agreed(_offsets(call))


def take_numbers(call: dict[str, Any], group: Group | None) -> None:
    """Says by `cu_seqlens` what a call says by `seq_idx` (B, n), the number of each token's document, this rank's."""
    numbers = call.pop("seq_idx", None)
    if numbers is None:
        return
    tokens = call["inputs_embeds" if call.get("input_ids") is None else "input_ids"]
    if not isinstance(numbers, Tensor) or numbers.shape != tokens.shape[:2]:
        raise ValueError(f"seq_idx must be (B, N) for tokens of {_shown(tokens)}, got {_shown(numbers)}")
    starts = (numbers if group is None else gather_sequence(numbers, 1, group)).diff(dim=1) != 0
    found = offsets_of(starts) if group is None else _one_row(starts, len(starts), "seq_idx")
    told = {} if call.get("cu_seqlens") is None else {"cu_seqlens": call["cu_seqlens"]}
    call["cu_seqlens"] = _agreed({**told, "seq_idx": found})


def _offsets(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Name -> offsets, taken out of a batch, as are the lengths that say nothing more."""
    told: dict[str, Tensor] = {name: batch.pop(name) for name in OFFSETS if batch.get(name) is not None}
    for name in (*OFFSETS, *LENGTHS):
        batch.pop(name, None)
    for name, offsets in told.items():
        if not isinstance(offsets, Tensor) or offsets.ndim != 1:
            raise ValueError(f"{name} must be a tensor of shape (documents + 1,), got {_shown(offsets)}")
    return told


def _agreed(told: dict[str, Tensor]) -> Tensor | None:
    """The offsets that all names tell of."""
    if not told:
        return None
    (first, offsets), *others = told.items()
    for name, other in others:
        # Empty documents, and the padding that some put behind the last one, begin nowhere.
        if name != "position_ids" and _distinct(offsets) != _distinct(other):
            raise ValueError(f"{name} and {first} tell of other documents: {_distinct(other)} and {_distinct(offsets)}")
        if name == "position_ids" and not set(_distinct(other)) <= set(_distinct(offsets)):
            raise ValueError(f"position_ids start anew elsewhere than {first} says, {_distinct(offsets)}")
    return offsets


def starts_of(position_ids: Tensor, kept: Tensor | None = None) -> Tensor:
    """(B or 1, N - 1) bool: where a token does not go on from the one before it; padding, where told, is no start."""
    starts = position_ids.diff(dim=1) != 1
    if kept is not None:
        starts = starts & kept[:, 1:].bool() & kept[:, :-1].bool()
    return starts


def offsets_of(starts: Tensor) -> Tensor:
    """`cu_seqlens` int64 on the CPU of all rows, one behind the other, from (B, N - 1) starts; a row is a start."""
    rows, tokens = starts.shape[0], starts.shape[1] + 1
    first = torch.ones(rows, 1, dtype=torch.bool)
    begins = torch.cat([first, starts.cpu()], 1).flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([rows * tokens])])


def shared_documents(position_ids: Tensor, rows: int, kept: Tensor | None, group: Group) -> Tensor | None:
    """`cu_seqlens` of the sequence of which this rank has a shard, if positions start anew anywhere in it.

    position_ids: (B or 1, n), kept: (B, n) or None, this rank's; rows: B. One small message a rank, and the positions
    themselves only where needed.
    """
    transport = resolve(group)
    assert transport is not None
    kept = None if kept is None else kept.bool()
    positions = position_ids.expand(rows, -1)

    def edge(at: int) -> list[int | None]:
        return [int(positions[row, at]) if kept is None or kept[row, at] else None for row in range(rows)]

    mine = (bool(starts_of(positions, kept).any()), edge(0), edge(-1))
    everyone = gathered(mine, transport, "where positions start anew")
    broken = any(inside for inside, _, _ in everyone)
    for (_, _, last), (_, first, _) in pairwise(everyone):
        broken |= any(a is not None and b is not None and b != a + 1 for a, b in zip(last, first, strict=True))
    if not broken:
        return None
    whole = gather_sequence(position_ids, 1, group)
    starts = starts_of(whole, None if kept is None else gather_sequence(kept, 1, group))
    return _one_row(starts, rows, "position_ids")


def _one_row(starts: Tensor, rows: int, name: str) -> Tensor:
    if max(rows, len(starts)) > 1 and bool(starts.any()):
        raise ValueError(f"{name} tell of several documents in a row; packed documents lie in one row, so B must be 1")
    return offsets_of(starts[:1])


def _distinct(offsets: Tensor) -> list[int]:
    return sorted(set(offsets.tolist()))


def _shown(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


__all__ = ["offsets_of", "shared_documents", "starts_of", "take_documents", "take_numbers", "take_offsets"]
