"""A causal depthwise convolution and its gradient, in PyTorch.

On a CPU each number has the same bits wherever it lies (leetdist.kernels.common.elementwise).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leetdist.kernels.common.elementwise import silu, silu_gradient


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
    y = _sums(torch.cat((around.before, x), 1), weight, bias, around.documents)
    return (silu(y) if activated else y).to(x.dtype)


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
    dy = dy.contiguous()  # the order of a sum follows the layout
    if activated:
        dy = dy * silu_gradient(_sums(given, weight, bias, documents))
    nothing = dy.new_zeros(len(dy), width, dy.shape[2])
    received = torch.cat((nothing, dy, nothing[:, : width - around.later]), 1)
    dx = torch.zeros((), dtype=wide, device=x.device)
    for tap in reversed(range(width + 1)):  # what a token gets from those that see it, from itself onwards
        later = received[:, width - tap : width - tap + width + tokens]
        if documents is not None:
            same = documents[:, : width + tokens] == documents[:, width - tap : width - tap + width + tokens]
            later = torch.where(same[..., None], later, 0.0)
        dx = dx + weight[:, tap].to(wide) * later
    dx, dy = dx.to(x.dtype), dy[:, :tokens]
    dweight = dbias = None
    if needs[0]:
        seen = _seen(given[:, : width + tokens].to(wide), width, documents)
        dweight = torch.stack([(dy * each).contiguous().sum((0, 1)) for each in seen], 1)
    if needs[1]:
        dbias = dy.contiguous().sum((0, 1))
    return Gradients(dx[:, width:], dx[:, :width], dweight, dbias)


def _sums(given: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """Of bias and taps, wide, of all tokens but the first W - 1 of `given`."""
    wide = torch.promote_types(given.dtype, torch.float32)
    weight = weight.to(wide)
    total = torch.zeros((), dtype=wide, device=given.device) if bias is None else bias.to(wide)
    for tap, x in enumerate(_seen(given.to(wide), weight.shape[1] - 1, documents)):
        total = total + weight[:, tap] * x
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
