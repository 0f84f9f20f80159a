"""Mamba-2's operator by the name, and with the arguments, of mamba_ssm; and a token of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.api import linear_attention_step
from leetdist.arguments import as_bool
from leetdist.engine import ops
from leetdist.engine.call import run
from leetdist.kernels.mamba.pytorch.scan import Steps
from leetdist.mamba import repeats
from leetdist.mamba.checks import check
from leetdist.mamba.passes import with_attention
from leetdist.sequence.agreement import told
from leetdist.sequence.group import name_of, resolve
from leetdist.sequence.halo import agreed_lengths, before_shard

if TYPE_CHECKING:
    from leetdist.sequence.group import Group
    from leetdist.sequence.transport import Transport


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    *,
    group: Group | None = None,
    tile: int | None = None,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2's selective state space (SSD), over a sequence on one device or sharded across ranks.

    For each batch entry and head, with `dt` after its bias, softplus and limits:

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = (S_t C_t + D x_t) silu(z_t)

    It is `linear_attention` with a decay a token: q = C, k = B, v = dt x, log_decay = dt A. The product dt x is rounded
    to x's dtype. It is written to memory only in a pass whose kernels do not make it for themselves.

    So the result on P ranks is, bit for bit, the shards of the result on one device: y, the final states, and the
    gradients of x, dt, B, C, z and initial_states. The gradients of A, D and dt_bias are each rank's share, and add up
    to the whole. Differentiable once.

    Args:
        x: (B, N, H, P), this rank's shard under a group, as are dt, B, C, z and seq_idx; fp32, bf16, fp16 or fp64.
        dt: (B, N, H), any floating dtype; fp32 (fp64 beside fp64) from here on.
        A: (H,), negative (or 0: no decay).
        B, C: (B, N, G, S) in x's dtype; G divides H, and consecutive heads share a group.
        chunk_size: mamba_ssm's setting of its kernels, which changes nothing here. `tile` is the one that counts.
        D: (H,) or (H, P), or None.
        z: (B, N, H, P), or None: no gate.
        dt_bias: (H,), added to dt.
        initial_states: (B, H, P, S), or (documents, H, P, S) with cu_seqlens; on the first rank only; None is zeros.
        seq_idx: (B, N) int32 or int64, the document of each token. The state restarts where it changes, and, as in
            mamba_ssm, initial_states are those of document 0. What a document gives does not depend on the others,
            but its bits do on where it begins; and one with a NaN is better told by cu_seqlens.
        cu_seqlens: (documents + 1,) int32 or int64, offsets in the whole sequence of documents packed in one row
            (B = 1), each with the bits that it has alone. (mamba_ssm takes them for return_varlen_states, beside
            seq_idx; here they are all that is told of documents, and final states are theirs too.)
        dt_softplus: whether dt goes through softplus, after its bias.
        dt_limit: (least, most), what dt is clamped to in the end.
        return_final_states: return the states after the last token too; under a group, on every rank.
        return_varlen_states: return the states at the end of each document of cu_seqlens, which are its final states;
            differentiable, where mamba_ssm's are not.
        group, tile, precision: as for `linear_attention`.

    Returns:
        y, (B, N, H, P) in x's dtype; or (y, states) with `return_final_states` or `return_varlen_states`, states fp32,
        shaped as initial_states; or (y, final states, states of documents) with both.

    Raises:
        ValueError: an argument is wrong, or the ranks disagree; every rank of the group raises.
        RuntimeError: a rank does not answer.

    Source: Mamba-2, arXiv 2405.21060, sections 5 and 6; the call is mamba_ssm 2.3's.

    >>> import torch, leetdist
    >>> x, dt, A = torch.randn(1, 100, 4, 16), torch.rand(1, 100, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 1, 100, 2, 32)
    >>> def rank(group):
    ...     mine = [leetdist.shard_sequence(y, 1, group) for y in (x, dt, B, C)]
    ...     return leetdist.mamba_chunk_scan_combined(mine[0], mine[1], A, *mine[2:], group=group)
    >>> y = leetdist.mamba_chunk_scan_combined(x, dt, A, B, C)
    >>> torch.equal(torch.cat(leetdist.virtual_ranks(rank, ranks=3), 1), y)
    True
    """
    transport = resolve(group)
    tensors = x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx
    short = transport is None and cu_seqlens is None and not ops.wanted(x) and repeats.possible(tensors)
    kind = None
    if short and type(dt_limit) is tuple:
        settings = chunk_size, dt_softplus, *dt_limit, return_final_states, return_varlen_states
        kind = repeats.kind_of(tensors, settings)
    if kind is None or kind not in repeats.checked:
        with told(ops.shared(transport, x), "the arguments of mamba_chunk_scan_combined"):
            check(
                x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
                dt_softplus, dt_limit, return_final_states, return_varlen_states,
                alone=transport is None,
            )  # fmt: skip
        if kind is not None:
            repeats.checked[kind] = None
    starts = None if seq_idx is None else _starts(seq_idx, transport)
    asked = as_bool("return_final_states", return_final_states), as_bool("return_varlen_states", return_varlen_states)
    times = sum(asked)  # that the states are returned: those of the documents are the final ones
    initial = None if initial_states is None else initial_states.to(torch.promote_types(x.dtype, torch.float32)).mT
    steps = Steps(as_bool("dt_softplus", dt_softplus), *map(float, dt_limit))
    options: dict[str, Any] = {
        "initial_state": initial, "return_state": times > 0, "cu_seqlens": cu_seqlens, "tile": tile,
        "precision": precision,
    }  # fmt: skip
    if short:
        y, states = repeats.run((x, dt, A, B, C, D, dt_bias, initial, starts), z, steps, **options)
        return y if states is None else (y, *[states.mT] * times)

    def attend(v: Tensor, log_decay: Tensor, weight: Tensor | None, skip: Tensor | None) -> Any:
        given = C.transpose(1, 2), B.transpose(1, 2), v, log_decay
        more = {"scale": 1.0, "method": "auto", **options}
        if weight is not None:
            return run(given, more, transport, weight=weight, skip=skip, gated=z is not None, around=alike)
        o, states = ops.linear_attention(*given, more, name_of(group), alike)
        return (o, states) if times else o

    alike = () if transport is None else _alike(steps, D, z, dt_bias)
    y, states = with_attention(attend, x, dt, A, D, z, dt_bias, starts, steps, weighted=not ops.wanted(x))
    return y if states is None else (y, *[states.mT] * times)


def _starts(seq_idx: Tensor, transport: Transport | None) -> Tensor:
    """(B, N): whether a token is of another document than the one before it. Before the sequence it is document 0, of
    which initial_states are."""
    rows, tokens = seq_idx.shape
    before = seq_idx.new_zeros(rows, 1)
    if transport is not None:
        facts = {"B": rows, "seq_idx of": seq_idx.dtype}
        lengths = agreed_lengths("mamba_chunk_scan_combined with seq_idx", tokens, facts, transport)
        before = before_shard(seq_idx, 1, 1, lengths, transport)
    return seq_idx != torch.cat((before, seq_idx[:, :-1]), 1)[:, :tokens]


def _alike(steps: Steps, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None) -> tuple[tuple[str, str], ...]:
    """What all ranks must have alike and the attention does not see, by name."""
    wide = "a number a head", "a row a head"
    given = {"D": D, "dt_bias": dt_bias}
    return (
        ("dt_softplus", str(steps.softplus)),
        ("dt_limit", str(steps[1:])),
        ("z", "None" if z is None else "a tensor"),
        *((name, "None" if x is None else wide[x.ndim - 1]) for name, x in given.items()),
    )


def decode(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `mamba_chunk_scan_combined` with softplus, by `linear_attention_step`: y, and the states after it,
    (B, H, P, S), which lie in memory as (B, H, S, P) and need no copy if the next step gets them as they are. inplace:
    they are written over `states`."""

    def attend(v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention_step(
            C.transpose(1, 2), B.transpose(1, 2), v, states.mT, log_decay, inplace=inplace
        )  # fmt: skip

    y, new = around(attend, x, dt, A, D=D, dt_bias=dt_bias, dt_limit=dt_limit)
    return y, states if inplace else new.mT


def around(
    attend: Callable[[Tensor, Tensor], tuple[Tensor, Any]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Any]:
    """`mamba_chunk_scan_combined` with softplus around another attention: y, and what `attend(v, log_decay)` returns
    beside outputs, of dt x, (B, H, N, P), and dt A, (B, H, N)."""
    steps = Steps(True, *map(float, dt_limit))
    return with_attention(
        lambda v, log_decay, *_: attend(v, log_decay), x, dt, A, D, None, dt_bias, None, steps, weighted=False
    )


__all__ = ["around", "decode", "mamba_chunk_scan_combined"]
