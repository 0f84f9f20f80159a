"""Causal softmax attention over a sharded sequence, for the softmax layers of hybrid models. Exact, differentiable.

Two ways, chosen by the number of heads: where the ranks divide the heads of q, an all-to-all gives each rank the whole
sequence of some heads (DeepSpeed-Ulysses, arXiv 2309.14509), which shares the work evenly; heads of k and v that are
fewer than the ranks go to each rank whose queries they answer. Otherwise every rank gathers the keys and values of all
and answers its own queries (Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2), whose later ranks work
more: the last (2 P - 1) / P of the mean.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from leetdist.mesh import process_group
from leetdist.sequence.group import resolve
from leetdist.sequence.halo import agreed_lengths
from leetdist.sequence.once import check_not_transformed
from leetdist.sequence.shard import gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group
    from leetdist.sequence.transport import Transport


@torch.compiler.disable  # the ranks talk by more than tensors
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group | None,
    *,
    scale: float | None = None,
    boundaries: tuple[int, ...] | None = None,
    kept: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of this rank's queries to all keys before them, on whichever rank those are.

    q (B, H, n, D); k, v (B, Hkv, n, D), this rank's shard, Hkv divides H; boundaries: global token offsets of packed
    documents, which do not see each other; kept: (B, N) bool, global, False for padding; softcap: the scores' bound, as
    in Gemma 2; sinks (H,): scores of a key without a value, as in gpt-oss (both of these make the whole matrix of
    scores). Without a group, the queries are those of the last tokens. Returns (B, H, n, Dv).
    """
    score = _Scores(scale, softcap, sinks)
    transport = resolve(group)
    if transport is None or transport.size == 1:
        return _causal(q, k, v, k.shape[2] - q.shape[2], score, boundaries, kept)
    check_not_transformed("softmax attention over ranks", q, k, v)
    grad = torch.is_grad_enabled()
    facts = {
        "dtype": q.dtype,
        "heads and their sizes": tuple((*x.shape[:2], x.shape[3]) for x in (q, k, v)),
        "requires_grad of q, k, v": tuple(grad and x.requires_grad for x in (q, k, v)),  # each has its own exchange
        "scale": None if scale is None else float(scale),
        "softcap": None if softcap is None else float(softcap),
        "sinks": "None" if sinks is None else "a tensor",
        "boundaries": None if boundaries is None else tuple(map(int, boundaries)),
        "kept": "None" if kept is None else "a tensor",
    }
    lengths = agreed_lengths("softmax_attention", q.shape[2], facts, transport)
    ranks = transport.size
    able = process_group(transport) is not None
    shared = math.lcm(k.shape[1], ranks)  # heads of k and v, each as often as ranks want it
    if able and q.shape[1] % shared == 0:
        copies = shared // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, copies, -1, -1).flatten(1, 2) for x in (k, v))
        q, k, v = (_Exchange.apply(x, lengths, transport, True) for x in (q, k, v))
        if sinks is not None:
            score = replace(score, sinks=sinks.chunk(ranks)[transport.rank])
        o = _causal(q, k, v, 0, score, boundaries, kept)
        out: Tensor = _Exchange.apply(o, lengths, transport, False)
        return out
    k, v = (gather_sequence(x, 2, group) for x in (k, v))
    return _causal(q, k, v, sum(lengths[: transport.rank]), score, boundaries, kept)


@dataclass(frozen=True)
class _Scores:
    """How queries and keys become weights."""

    scale: float | None
    softcap: float | None
    sinks: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (B or 1, 1, n, m) bool; None lets the last query see all keys, and each one before it one less."""
        grouped = q.shape[1] != k.shape[1]
        if self.softcap is None and self.sinks is None:
            bias: Any = causal_lower_right(q.shape[2], k.shape[2]) if mask is None else mask
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale, enable_gqa=grouped)
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (q.shape[3] ** -0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores, -1, dtype=wide)[..., : k.shape[2]].to(v.dtype) @ v


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int,
    score: _Scores,
    boundaries: tuple[int, ...] | None,
    kept: Tensor | None,
) -> Tensor:
    """Queries of the tokens from `offset` on, keys of all tokens; one call a document, none larger than it must be."""
    end = offset + q.shape[2]
    boundaries = boundaries or (0, k.shape[2])
    parts = []
    for first, last in list(pairwise(boundaries))[max(0, bisect_right(boundaries, offset) - 1) :]:
        begin, stop = max(first, offset), min(last, end)
        if begin < stop:
            keys = slice(first, stop)
            mask = None
            if kept is not None:
                rows, columns = (torch.arange(*span, device=q.device) for span in ((begin, stop), (first, stop)))
                # A token always sees itself: a row without any key would be NaN, also where it is padding.
                seen = kept[:, None, None, keys] | (rows[:, None] == columns)
                mask = seen & (rows[:, None] >= columns)
            queries = q[:, :, begin - offset : stop - offset]
            parts.append(score.attend(queries, k[:, :, keys], v[:, :, keys], mask))
    if parts:
        return torch.cat(parts, 2)
    # A rank without queries has gathered keys all the same, and the others wait for it in the backward pass.
    return q.new_zeros(*q.shape[:3], v.shape[3]) + sum(x[:, :, :0].sum() for x in (q, k, v))


class _Exchange(torch.autograd.Function):
    """All-to-all between shards of the sequence with all heads, and the whole sequence with some heads.

    to_heads: (B, H, n, D) -> (B, H / P, N, D); else back. The backward is the other direction,
    and that one's the first again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], transport: Transport, to_heads: bool) -> Tensor:
        ctx.rest = (lengths, transport, to_heads)
        return _exchange(x, lengths, transport, to_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        lengths, transport, to_heads = ctx.rest
        return _Exchange.apply(grad, lengths, transport, not to_heads), None, None, None


def _exchange(x: Tensor, lengths: tuple[int, ...], transport: Transport, to_heads: bool) -> Tensor:
    batch, heads, _, width = x.shape
    ranks, mine = len(lengths), lengths[transport.rank]
    if to_heads:
        parts, heads = list(x.chunk(ranks, 1)), heads // ranks
        arriving = [(batch, heads, length, width) for length in lengths]
    else:
        parts = list(x.split(lengths, 2))
        arriving = [(batch, heads, mine, width)] * ranks
    sent = torch.cat([part.reshape(-1) for part in parts])
    sizes = [batch * heads * shape[2] * width for shape in arriving]
    received = sent.new_empty(sum(sizes))
    with transport.collective("heads of other ranks' tokens"):
        dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=process_group(transport))
    pieces = [piece.view(shape) for piece, shape in zip(received.split(sizes), arriving, strict=True)]
    return torch.cat(pieces, 2 if to_heads else 1)


__all__ = ["softmax_attention"]
