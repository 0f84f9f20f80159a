"""A causal depthwise convolution over a sharded sequence, with the bits of one device."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.arguments import as_bool, as_name, check_plain, for_autograd, transformed
from leetdist.kernels.mamba.pytorch import conv
from leetdist.operators.layer_steps import kernel
from leetdist.sequence.documents import check_end, check_offsets, check_one_row, check_told_once, known_offsets
from leetdist.sequence.group import resolve
from leetdist.sequence.halo import agreed_lengths, before_shard, check_initial, tokens_of
from leetdist.sequence.once import check_not_transformed, differentiated_once
from leetdist.sequence.shard import gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group
    from leetdist.sequence.transport import Transport

ACTIVATIONS = (None, "silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial: Tensor | None = None,
    return_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each channel convolved with its own W taps, of which the last is the token's own:

        y_t = activation(bias + sum_j weight[:, j] x_{t - (W - 1) + j})

    summed in fp32 (fp64 beside fp64), tap by tap, and rounded once. The result on P ranks is, bit for bit, the shards
    of the result on one device, and so is the gradient of x; shards may have any lengths. Those of weight and bias are
    each rank's share: the ranks' add up to the whole.

    Args:
        x: (B, N, C), this rank's shard under a group; fp32, bf16, fp16 or fp64.
        weight: (C, W), any floating dtype.
        bias: (C,), or None.
        activation: "silu" or None.
        initial: (B, W - 1, C), the tokens before the sequence, on the first rank only; None is zeros.
        return_state: return the last W - 1 tokens of the whole sequence as well (or those of each document), which as
            `initial` let the next call go on; under a group every rank gets them.
        seq_idx: (B, N) int32 or int64, the document of each token, this rank's shard; a token sees those of its own.
            The tokens of `initial` are of document 0. Of the last tokens those of other documents than the very last
            one's are zeros.
        cu_seqlens: (documents + 1,) int32 or int64, offsets of documents packed in one row (B = 1), in the whole
            sequence.
        group: as for `leetdist.linear_attention`.

    Returns:
        y, (B, N, C) in x's dtype; or (y, state) with `return_state`, state (B or documents, W - 1, C).

    Raises:
        ValueError: an argument is wrong, or the ranks disagree; every rank of the group raises.
        RuntimeError: a rank does not answer.

    Source: the short convolution of Mamba, arXiv 2312.00752, section 3.4.

    >>> import torch, leetdist
    >>> x, weight = torch.randn(1, 100, 8), torch.randn(8, 4)
    >>> def rank(group):
    ...     return leetdist.nn.causal_conv1d(leetdist.shard_sequence(x, 1, group), weight, group=group)
    >>> torch.equal(torch.cat(leetdist.virtual_ranks(rank, ranks=3), 1), leetdist.nn.causal_conv1d(x, weight))
    True
    """
    transport = resolve(group)
    facts: dict[str, Hashable] | ValueError
    try:
        facts = _check(x, weight, bias, activation, initial, return_state, seq_idx, cu_seqlens, transport)
    except ValueError as error:
        if transport is None:
            raise
        facts = error
    tokens = x.shape[1] if isinstance(facts, dict) else 0
    lengths: tuple[int, ...] = (tokens,)
    if transport is not None:
        lengths = agreed_lengths("causal_conv1d", tokens, facts, transport)
        check_not_transformed("causal_conv1d over ranks", *(y for y in (x, weight, bias, initial) if y is not None))
    check_end(cu_seqlens, lengths)
    width = weight.shape[1] - 1
    documents = _documents(x, width, lengths, seq_idx, cu_seqlens, transport)
    y: Tensor
    if transport is None:
        before = x.new_zeros(x.shape[0], width, x.shape[2]) if initial is None else initial
    else:
        # Without a gradient: the backward asks the ranks to the right instead.
        with torch.no_grad():
            before = before_shard(x, 1, width, lengths, transport, initial=initial)
        if initial is not None:
            before = initial
    x, before, weight = (for_autograd(part) for part in (x, before, weight))
    bias = None if bias is None else for_autograd(bias)
    if transport is None and transformed():
        y = conv.followed_convolution(x, weight, bias, conv.Around(before, documents), activation is not None)
    else:
        y = _CausalConv.apply(x, before, weight, bias, activation, documents, lengths, transport)
    if not return_state:
        return y
    return y, _last_tokens(x, width, lengths, initial, seq_idx, cu_seqlens, transport)


class _CausalConv(torch.autograd.Function):
    """before: the W - 1 tokens before x; its gradient is that of the first rank's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        before: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        documents: Tensor | None,
        lengths: tuple[int, ...],
        transport: Transport | None,
    ) -> Tensor:
        ctx.save_for_backward(x, before, weight, bias, documents)
        ctx.asked = activation, lengths, transport
        function = kernel(conv.convolution, x, weight.shape[1])
        y: Tensor = function(x, weight, bias, conv.Around(before, documents), activation is not None)
        return y

    @staticmethod
    @differentiated_once("causal_conv1d")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, before, weight, bias, documents = ctx.saved_tensors
        activation, lengths, transport = ctx.asked
        width, around = weight.shape[1] - 1, conv.Around(before, documents)
        if transport is not None and width:
            # What sees the last tokens here: of the ranks to the right, their first tokens.
            held = [min(width, tokens) for tokens in lengths]
            ends = list(accumulate(held))
            firsts = torch.cat((x[:, :width], dy[:, :width]), 2)
            after = tokens_of(firsts, 1, tuple(held), [(end, end + width) for end in ends], transport)
            later = min(width, ends[-1] - ends[transport.rank])
            if later:
                around = conv.Around(before, documents, later, *after.chunk(2, 2))
        needs = ctx.needs_input_grad[2], bias is not None and ctx.needs_input_grad[3]
        function = kernel(conv.convolution_gradient, x, width + 1)
        dx, first, dweight, dbias = function(dy, x, weight, bias, around, activation is not None, needs)
        dweight = None if dweight is None else dweight.to(weight.dtype)
        dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
        return dx, first if ctx.needs_input_grad[1] else None, dweight, dbias, *[None] * 4


def _documents(
    x: Tensor,
    width: int,
    lengths: tuple[int, ...],
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    transport: Transport | None,
) -> Tensor | None:
    """(B or 1, W - 1 + N + W - 1): the document of each token here and around; None where there is only one."""
    rank = 0 if transport is None else transport.rank
    begin = sum(lengths[:rank])
    if cu_seqlens is not None:
        tokens = torch.arange(begin - width, begin + lengths[rank] + width, device=x.device)
        return torch.searchsorted(cu_seqlens.to(x.device), tokens, right=True)[None]
    if seq_idx is None:
        return None
    if transport is None:
        around = seq_idx.new_zeros(seq_idx.shape[0], width)
        return torch.cat((around, seq_idx, around), 1)
    before = before_shard(seq_idx, 1, width, lengths, transport)
    ends = list(accumulate(lengths))
    after = tokens_of(seq_idx, 1, lengths, [(end, end + width) for end in ends], transport)
    return torch.cat((before, seq_idx, after), 1)


def _last_tokens(
    x: Tensor,
    width: int,
    lengths: tuple[int, ...],
    initial: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    transport: Transport | None,
) -> Tensor:
    """The last `width` tokens of the sequence, zeros for those of other documents than the last one's; or of each
    document, with zeros before them; on every rank."""
    rank = 0 if transport is None else transport.rank
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(x.device)
        tokens = offsets[1:, None] - width + torch.arange(width, device=x.device)
        begin = sum(lengths[:rank])
        here = (tokens >= offsets[:-1, None]) & (tokens >= begin) & (tokens < begin + lengths[rank])
        row = torch.cat((x[0], x.new_zeros(1, x.shape[2])))  # of a rank without tokens, too
        mine = torch.where(here[..., None], row[(tokens - begin).clamp(0, lengths[rank])], 0.0)
        return mine if transport is None else gather_sequence(mine[None], 0, transport).sum(0)

    # Of each rank its last tokens alone: a view of all would keep x for as long as the state. (In a graph, which takes
    # any number of tokens, they are copied in the end.)
    traced = torch.compiler.is_compiling()
    held = [tokens if traced else min(tokens, width) for tokens in lengths]

    def last(x: Tensor, start: Tensor) -> Tensor:
        x = x[:, lengths[rank] - held[rank] :]
        if rank == 0:
            x = torch.cat((start, x), 1)
        if transport is None:
            return x[:, held[0] :].clone() if traced else x[:, held[0] :]
        end = width + sum(held)
        return tokens_of(x, 1, (held[0] + width, *held[1:]), [(end - width, end)] * transport.size, transport)

    found = last(x, x.new_zeros(x.shape[0], width, x.shape[2]) if initial is None else initial)
    if seq_idx is None or not width:
        return found
    documents = last(seq_idx, seq_idx.new_zeros(x.shape[0], width))
    return torch.where((documents == documents[:, -1:])[..., None], found, 0.0)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial: Tensor | None,
    return_state: bool,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    transport: Transport | None,
) -> dict[str, Hashable]:
    """Every argument of one rank; what the ranks must have in common, by name."""
    check_plain("x", x)
    check_plain("weight", weight)
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"x must be floating of shape (B, N, C), got {x.dtype} of shape {tuple(x.shape)}")
    rows, tokens, channels = x.shape
    if not rows or not channels:
        raise ValueError(f"x must have no empty dimension but N, got {tuple(x.shape)}")
    if tokens == 0 and transport is None:
        raise ValueError("x: N is 0; a sequence needs at least one token")
    if weight.ndim != 2 or weight.shape[0] != channels or not weight.shape[1]:
        raise ValueError(f"weight must have shape (C, W) = ({channels}, at least 1), got {tuple(weight.shape)}")
    if bias is not None:
        check_plain("bias", bias, "a tensor or None")
        if bias.shape != (channels,):
            raise ValueError(f"bias must have shape (C,) = ({channels},), got {tuple(bias.shape)}")
    _check_documents(x, seq_idx, cu_seqlens)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and not other.is_floating_point():
            raise ValueError(f"{name} must be floating, got {other.dtype}")
    for name, other in (("weight", weight), ("bias", bias), ("seq_idx", seq_idx)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {other.device}")
    activation, return_state = as_name("activation", activation, ACTIVATIONS), as_bool("return_state", return_state)
    grad = torch.is_grad_enabled()
    if initial is not None:
        check_initial(initial, [rows, weight.shape[1] - 1, channels], x, transport)
        if transport is not None and grad and initial.requires_grad and not x.requires_grad:
            raise ValueError("initial needs a gradient, so x must, on every rank: all have a backward then")
    if cu_seqlens is not None and initial is not None:
        raise ValueError("initial must be None with cu_seqlens: each document starts from zeros")
    parameters = weight.requires_grad or (bias is not None and bias.requires_grad)
    return {
        "B": rows,
        "C": channels,
        "W": weight.shape[1],
        "dtype": x.dtype,
        "activation": activation,
        "bias": "None" if bias is None else "a tensor",
        "return_state": return_state,
        "seq_idx": "None" if seq_idx is None else f"a tensor of {seq_idx.dtype}",  # which ranks send each other
        "cu_seqlens": known_offsets(cu_seqlens),
        "gradients": grad and (x.requires_grad or parameters),
        "gradients of x": grad and x.requires_grad,
    }


def _check_documents(x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """The two ways in which (B, N, ...) tokens tell of their documents."""
    check_told_once(seq_idx, cu_seqlens)
    if seq_idx is not None:
        check_plain("seq_idx", seq_idx, "a tensor or None")
        if seq_idx.shape != x.shape[:2] or seq_idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"seq_idx must be int32 or int64 of shape (B, N) = {tuple(x.shape[:2])}, got {seq_idx.dtype} of shape "
                f"{tuple(seq_idx.shape)}"
            )
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, x)
        check_one_row(x.shape[0])


__all__ = ["causal_conv1d"]
