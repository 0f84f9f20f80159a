"""Decoding: several tokens of many requests a call, on states in a pool, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leetdist.arguments import in_memory, transformed, without_autocast
from leetdist.engine.checks import describe
from leetdist.engine.inputs import a_head
from leetdist.engine.ops import define, without_numbers
from leetdist.inference.checks import check_steps
from leetdist.kernels.constant_decay.pytorch import decode
from leetdist.operators.dispatch import decoder
from leetdist.sequence.group import check_alone


def linear_attention_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Any,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    index: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """T tokens of each of B requests at once: all T outputs, and the states moved on in place.

    The same bits as T calls of one token (with fp32 states). `lengths` says how many of the T tokens a row keeps:
    T by default; fewer for a request with fewer tokens to add; 0 leaves its state alone. That makes speculative
    decoding two calls and an exact rollback: *verify* with lengths 0 (T outputs, nothing changes), then *accept*
    with the length of the accepted prefix. The state is what it would be had the other tokens never been seen. No
    gradient is recorded, whatever the inputs require: `linear_attention` and `linear_attention_step` have gradients.

    Args:
        q: (B, H, T, Dk), fp32, bf16, fp16 or fp64.
        k: (B, H, T, Dk), same dtype and device. Each of q, k and v may have fewer heads, which divide the largest.
        v: (B, H, T, Dv).
        states: (slots, H, Dk, Dv) fp32 (fp64 with fp64 inputs), or bf16, then rounded once a call; changed in place. Or
            a `StatePool`, whose decay and scale count, and whose slots grow older; an exact one gives up to 8 tokens
            the bits that `linear_attention` gives them.
        log_decay: (H,) or (H, 1, 1) fp32, or (B, H, T), one a token; natural log, <= 0 (-inf: the token starts
            anew); None is no decay.
        scale: factor of the output.
        index: (B,) int32 or int64, the slot of each row, all different; None: row b is slot b. Rows of length 0 may
            share a slot, which pads a batch to the size a CUDA graph was captured with (see `StatePool.idle`).
        lengths: (B,) int32 or int64, tokens that each row keeps, 0 to T. On a GPU neither is read on the host: a call
            can be captured in a CUDA graph and replayed for other requests by writing new values into both. There, a
            row with a slot or a length that does not exist changes no state and its outputs are NaN; rows that keep
            tokens of one slot leave there what either of them makes.

    Returns:
        o, (B, H, T, Dv) in q's dtype, for all T tokens.

    Raises:
        ValueError: an argument is wrong (the message says which, what it is and what it must be; values of index and
            lengths on the CPU), or a `sequence_parallel` of several ranks surrounds the call: a token has no shards.

    Source: RetNet, arXiv 2307.08621, eq. 6; verification of drafts: Leviathan et al., arXiv 2211.17192.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(3, 2, 4, 16) for _ in range(3))             # 4 draft tokens of 3 requests
    >>> pool, index = torch.randn(8, 2, 16, 16), torch.tensor([5, 0, 2])   # which live in 3 of 8 slots
    >>> before = pool.clone()
    >>> o = leetdist.linear_attention_steps(q, k, v, pool, index=index, lengths=torch.tensor([0, 0, 0]))
    >>> torch.equal(pool, before)                                          # verified; now accept 4, 1 and none
    True
    >>> o = leetdist.linear_attention_steps(q, k, v, pool, index=index, lengths=torch.tensor([4, 1, 0]))
    >>> [not torch.equal(pool[i], before[i]) for i in index]
    [True, True, False]
    """
    if not isinstance(states, Tensor):
        return _on_pool(q, k, v, states, a_head(log_decay, q, k, v), scale, index, lengths)
    return advance(q, k, v, states, log_decay, scale=scale, index=index, lengths=lengths)


def _on_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Any,
    log_decay: Tensor | None,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    if not hasattr(pool, "steps"):
        raise ValueError(f"states must be a tensor or a StatePool, got {type(pool).__name__}")
    if scale not in (1.0, pool.scale):
        raise ValueError(f"scale must be the pool's own, {pool.scale}, or not be given, got {scale}")
    if index is None:
        raise ValueError("index must be given with a StatePool: it names the slot of each row")
    if log_decay is not None and log_decay.ndim == 1:
        pool.check_decay(log_decay)
        log_decay = None
    o: Tensor = pool.steps(q, k, v, index, lengths, log_decay=log_decay)
    return o


@torch.no_grad()
def advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
    ages: Tensor | None = None,
) -> Tensor:
    """`linear_attention_steps`; ages: (slots,) int64, to which the tokens that each slot keeps are added."""
    log_decay = a_head(log_decay, q, k, v)
    if torch.compiler.is_compiling():
        compiled: Tensor = _steps_op(q, k, v, states, log_decay, float(scale), index, lengths, ages)
        return compiled
    check_alone("linear_attention_steps")
    plain = transformed() or without_numbers(q)  # by operations, which all of PyTorch follows
    problem = describe(
        q, k, v, log_decay, read_values=not plain,
        scale=scale, initial_state=None, return_state=True, cu_seqlens=None, method="auto", tile=None,
    )  # fmt: skip
    check_steps(q, k, v, states, index, lengths)
    steps = decode.steps if plain else decoder("steps", problem).function()
    if not plain:
        q, k, v, log_decay = in_memory(q, k, v, log_decay)
    with without_autocast(q.device):
        o: Tensor = steps(q, k, v, states, log_decay, scale=problem.scale, index=index, lengths=lengths, ages=ages)
    return o


def _run_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    log_decay: Tensor | None,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
    ages: Tensor | None,
) -> Tensor:
    return advance(q, k, v, states, log_decay, scale=scale, index=index, lengths=lengths, ages=ages)


_steps_op = define(
    "linear_attention_steps",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) states, Tensor? log_decay, float scale, Tensor? index, "
    "Tensor? lengths, Tensor(b!)? ages) -> Tensor",
    _run_steps,
    lambda q, k, v, *_: q.new_empty(q.shape[0], max(x.shape[1] for x in (q, k, v)), q.shape[2], v.shape[3]),
)


__all__ = ["advance", "linear_attention_steps"]
