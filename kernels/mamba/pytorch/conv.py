"""A causal depthwise convolution and its gradient, in PyTorch.

On a CPU each number has the same bits wherever it lies (leetdist.kernels.common.elementwise). So some tokens are taken
after the others, few enough to stay in the cache through all operations: they take less time than memory would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from leetdist.kernels.common.elementwise import by_parts, silu, silu_, silu_gradient

# Numbers that a thread of a CPU takes at once.
SLAB = 1 << 17


class Around(NamedTuple):
    """What lies around x (B, N, C): the W - 1 tokens `before`, (B, W - 1, C); of the W - 1 tokens after it, x and dy,
    where `later` of them are of the sequence (None: 0 are); documents, (B or 1, W - 1 + N + W - 1) int, of all of these
    tokens, or None."""

    before: Tensor
    documents: Tensor | None
    later: int = 0
    x_after: Tensor | None = None
    dy_after: Tensor | None = None


class Gradients(NamedTuple):
    """Of x, of the tokens before it, and of what `needs` has of the weight and the bias."""

    x: Tensor
    before: Tensor
    weight: Tensor | None
    bias: Tensor | None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, around: Around, activated: bool) -> Tensor:
    """The sum of bias and taps, the earliest first, through SiLU where `activated`, rounded once: (B, N, C)."""
    y, width = x.new_empty(x.shape), weight.shape[1] - 1
    for begin, end in _slabs(x, x.shape[1], width):
        given = x[:, begin - width : end] if begin else torch.cat((around.before, x[:, :end]), 1)
        sums = _sums(given, weight, bias, _part(around.documents, begin, end + width))
        y[:, begin:end] = silu_(sums) if activated else sums
    return y


def followed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, around: Around, activated: bool) -> Tensor:
    """`convolution`, its bits too, by operations that torch.func's transforms follow: nothing is written over."""
    given = torch.cat((around.before, x), 1)
    documents = _part(around.documents, 0, given.shape[1])
    sums = _sums(given, weight, bias, documents, add=torch.add)
    return (silu(sums) if activated else sums).to(x.dtype)


def convolution_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    around: Around,
    activated: bool,
    needs: tuple[bool, bool],
) -> Gradients:
    """What x, the tokens before it, weight (C, W) and bias (C,) get; the last two wide, of the tokens here."""
    tokens, width = x.shape[1], weight.shape[1] - 1
    given, documents = torch.cat((around.before, x), 1), around.documents
    wide = torch.promote_types(x.dtype, torch.float32)
    dy = dy.to(wide)
    if around.x_after is not None and around.dy_after is not None:
        given = torch.cat((given, around.x_after[:, : around.later]), 1)
        dy = torch.cat((dy, around.dy_after[:, : around.later].to(wide)), 1)
    nothing = dy.new_zeros(dy.shape[0], width, dy.shape[2])
    received = torch.cat((nothing, dy, nothing[:, : width - around.later]), 1)
    dy = received[:, width : width + dy.shape[1]]
    if activated:
        for begin, end in _slabs(x, dy.shape[1], width):
            sums = _sums(given[:, begin : end + width], weight, bias, _part(documents, begin, end + width))
            dy[:, begin:end] *= silu_gradient(sums)
    dx = x.new_empty(x.shape[0], width + tokens, x.shape[2])
    for begin, end in _slabs(x, width + tokens, width):
        total = torch.zeros((), dtype=wide, device=x.device)
        for tap in reversed(range(width + 1)):  # what a token gets from those that see it, from itself onwards
            first, last = begin + width - tap, end + width - tap
            later = received[:, first:last]
            if documents is not None:
                same = documents[:, begin:end] == documents[:, first:last]
                later = torch.where(same[..., None], later, 0.0)
            total = total + weight[:, tap].to(wide) * later
        dx[:, begin:end] = total
    dy = dy[:, :tokens]
    dweight = dbias = None
    if needs[0]:
        seen = _seen(given[:, : width + tokens].to(wide), width, documents)
        dweight = torch.stack([(dy * each).contiguous().sum((0, 1)) for each in seen], 1)
    if needs[1]:
        dbias = dy.contiguous().sum((0, 1))
    return Gradients(dx[:, width:], dx[:, :width], dweight, dbias)


def _slabs(like: Tensor, tokens: int, least: int) -> Iterator[tuple[int, int]]:
    """Parts of so many tokens like (B, ..., C), of at least so many each but the last; one where it is a GPU's."""
    if not by_parts(like):
        if tokens:
            yield 0, tokens
        return
    rows = max(SLAB * torch.get_num_threads() // (like.shape[0] * like.shape[2]), least, 1)
    for begin in range(0, tokens, max(rows, 1)):
        yield begin, min(begin + rows, tokens)


def _part(documents: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if documents is None else documents[:, begin:end]


def _sums(
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    add: Callable[..., Tensor] = Tensor.add_,
) -> Tensor:
    """Of bias and taps, wide, of all tokens but the first W - 1 of `given`."""
    wide = torch.promote_types(given.dtype, torch.float32)
    first, *taps = weight.to(wide).unbind(1)
    seen, *others = _seen(given.to(wide), len(taps), documents)
    total = add(first * seen, 0.0 if bias is None else bias.to(wide))
    for tap, x in zip(taps, others, strict=True):
        total = add(total, tap * x)
    return total


def _seen(given: Tensor, width: int, documents: Tensor | None) -> list[Tensor]:
    """What each tap sees at each token: (B, N, C), zeros where that is of another document."""
    tokens = given.shape[1] - width
    taps = [given[:, tap : tap + tokens] for tap in range(width + 1)]
    if documents is None:
        return taps
    own = documents[:, width : width + tokens]
    # Not multiplied by 0: another document's NaN is none of this one's.
    return [torch.where((documents[:, tap : tap + tokens] == own)[..., None], x, 0.0) for tap, x in enumerate(taps)]
