"""A causal depthwise convolution and its gradient, in Triton: each in one pass over its tensors.

The gradient computes the sums of a token anew for each tap that sees it, out of what lies in the cache, instead of
writing them down in fp32. Sums over tokens are taken by SEGMENT tokens, and then segment by segment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.mamba.pytorch.conv import Around, Gradients
from leetdist.kernels.runtime.triton_launch import launch

CHANNELS = 128  # of a program
TOKENS, TOKENS_BACK = 32, 8  # at a time
SEGMENT = 256  # tokens whose sums one program takes
COUNTS = ["tokens", "later"]


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, around: Around, activated: bool) -> Tensor:
    """See leetdist.kernels.mamba.pytorch.conv.convolution."""
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        launch(
            _convolution,
            (ceil_div(tokens, TOKENS) * batch, ceil_div(channels, CHANNELS)),
            (*_given(x, weight, bias, around), y, tokens, channels),
            {"W": weight.shape[1], "ACTIVATED": activated, "TOKENS_": TOKENS, "CHANNELS_": CHANNELS},
            num_warps=4,
        )
    return y


def convolution_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    around: Around,
    activated: bool,
    needs: tuple[bool, bool],
) -> Gradients:
    """See leetdist.kernels.mamba.pytorch.conv.convolution_gradient."""
    batch, tokens, channels = x.shape
    taps = weight.shape[1]
    segments = ceil_div(tokens + taps - 1, SEGMENT)
    dx, before = (torch.empty(y.shape, dtype=x.dtype, device=x.device) for y in (x, around.before))
    parts = x.new_empty(batch * segments, taps, channels, dtype=torch.float32) if needs[0] else None
    sums = x.new_empty(batch * segments, channels, dtype=torch.float32) if needs[1] else None
    after = [None if y is None else y.contiguous() for y in (around.x_after, around.dy_after)]
    if segments:
        launch(
            _convolution_gradient,
            (segments * batch, ceil_div(channels, CHANNELS)),
            (
                *_given(x, weight, bias, around), dy, *after, dx, before, parts, sums, *dy.stride(),
                tokens, channels, segments, around.later,
            ),
            {
                "W": taps, "ACTIVATED": activated,
                "TOKENS_": TOKENS_BACK, "CHANNELS_": CHANNELS, "SEGMENT_": SEGMENT,
            },
            num_warps=4,
        )  # fmt: skip
    dweight = None if parts is None else parts.sum(0).T
    return Gradients(dx, before, dweight, None if sums is None else sums.sum(0))


def compile_for(
    step: str, rows: int, columns: int, dtype: torch.dtype, wide: bool, reverse: bool, programs: int,
    device: torch.device, *, share: int = 1,
) -> None:  # fmt: skip
    """Launch a step's kernel once, on a token of zeros."""
    x = torch.zeros(1, 1, 1, dtype=dtype, device=device)
    weight, around = x.new_zeros(1, columns), Around(x.new_zeros(1, columns - 1, 1), None)
    if step == "convolution":
        convolution(x, weight, weight[:, 0], around, True)
    else:
        convolution_gradient(x, x, weight, weight[:, 0], around, True, (True, True))


def _given(x: Tensor, weight: Tensor, bias: Tensor | None, around: Around) -> tuple[object, ...]:
    """The arguments that both kernels begin with."""
    documents = around.documents
    rows = 0 if documents is None or documents.shape[0] == 1 else documents.shape[1]
    return (
        x, around.before.resolve_neg().contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(),
        None if documents is None else documents.contiguous(), *x.stride(), rows,
    )  # fmt: skip


@triton.jit
def _token(x, before, after, at, c, row, x_token, x_channel, tokens, later, channels, W: tl.constexpr):
    """Token `at` of what is here, before it and after it; 0 elsewhere."""
    inside = c < channels
    here = tl.load(x + at * x_token + c * x_channel, mask=(at >= 0) & (at < tokens) & inside, other=0.0).to(tl.float32)
    if before is not None:
        place = before + (row * (W - 1) + at + (W - 1)) * channels + c
        earlier = tl.load(place, mask=(at < 0) & (at > -W) & inside, other=0.0).to(tl.float32)
        here = tl.where(at < 0, earlier, here)
    if after is not None:
        place = after + (row * (W - 1) + at - tokens) * channels + c
        there = tl.load(place, mask=(at >= tokens) & (at < tokens + later) & inside, other=0.0).to(tl.float32)
        here = tl.where(at >= tokens, there, here)
    return here


@triton.jit
def _document(documents, at, tokens, W: tl.constexpr):
    """Of token `at`, from W - 1 before those that are here to W - 1 after them."""
    return tl.load(documents + at + (W - 1), mask=(at > -W) & (at < tokens + (W - 1)), other=-1)


@triton.jit
def _seen(
    x, before, after, documents, first, at: tl.constexpr, by: tl.constexpr, c, row, x_token, x_channel, tokens, later,
    channels, W: tl.constexpr,
):  # fmt: skip
    """What token first + by sees of token first + at."""
    seen = _token(x, before, after, first + at, c, row, x_token, x_channel, tokens, later, channels, W)
    if documents is not None:
        same = _document(documents, first + at, tokens, W) == _document(documents, first + by, tokens, W)
        seen = tl.where(same, seen, 0.0)
    return seen


@triton.jit
def _sums(
    x, before, after, weight, bias, documents, first, by: tl.constexpr, c, row, x_token, x_channel, tokens, later,
    channels, W: tl.constexpr,
):  # fmt: skip
    """Of bias and taps, of token first + by."""
    total = tl.zeros_like(c).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    for tap in tl.static_range(W):
        seen = _seen(
            x, before, after, documents, first, by + tap - (W - 1), by, c, row, x_token, x_channel, tokens, later,
            channels, W,
        )  # fmt: skip
        total = total + tl.load(weight + c * W + tap, mask=c < channels, other=0.0).to(tl.float32) * seen
    return total


@triton.jit(do_not_specialize=COUNTS)
def _convolution(
    x, before, weight, bias, documents, x_batch, x_token, x_channel, documents_batch, y, tokens, channels,
    W: tl.constexpr, ACTIVATED: tl.constexpr, TOKENS_: tl.constexpr, CHANNELS_: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, TOKENS_)
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    i = block * TOKENS_ + tl.arange(0, TOKENS_)[:, None]
    c = tl.program_id(1) * CHANNELS_ + tl.arange(0, CHANNELS_)[None, :]
    x += row * x_batch
    if documents is not None:
        documents += row * documents_batch
    total = _sums(x, before, None, weight, bias, documents, i, 0, c, row, x_token, x_channel, tokens, 0, channels, W)
    if ACTIVATED:
        total = total / (1.0 + tl.exp(-total))
    out = y + (row * tokens + i) * channels + c
    tl.store(out, total.to(y.dtype.element_ty), mask=(i < tokens) & (c < channels))


@triton.jit(do_not_specialize=COUNTS)
def _convolution_gradient(
    x, before, weight, bias, documents, x_batch, x_token, x_channel, documents_batch,
    dy, x_after, dy_after, dx, dbefore, dweight, dbias, dy_batch, dy_token, dy_channel,
    tokens, channels, segments, later,
    W: tl.constexpr, ACTIVATED: tl.constexpr, TOKENS_: tl.constexpr, CHANNELS_: tl.constexpr, SEGMENT_: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, segment = program // segments, program % segments
    c = tl.program_id(1) * CHANNELS_ + tl.arange(0, CHANNELS_)[None, :]
    x += row * x_batch
    dy += row * dy_batch
    if documents is not None:
        documents += row * documents_batch
    # Of the bias and of each of at most four taps, for Triton has no arrays of blocks.
    sum_bias = tl.zeros((TOKENS_, CHANNELS_), tl.float32)
    sum_0, sum_1, sum_2, sum_3 = sum_bias, sum_bias, sum_bias, sum_bias
    for offset in range(0, SEGMENT_, TOKENS_):
        # From the first of the tokens before those that are here, which get gradients too.
        i = segment * SEGMENT_ + offset - (W - 1) + tl.arange(0, TOKENS_)[:, None]
        total = tl.zeros((TOKENS_, CHANNELS_), tl.float32)
        for by in tl.static_range(W):
            grown = _token(dy, None, dy_after, i + by, c, row, dy_token, dy_channel, tokens, later, channels, W)
            if ACTIVATED:
                summed = _sums(
                    x, before, x_after, weight, bias, documents, i, by, c, row, x_token, x_channel, tokens, later,
                    channels, W,
                )  # fmt: skip
                s = 1.0 / (1.0 + tl.exp(-summed))
                grown *= s * (1.0 + summed * (1.0 - s))
            grown = tl.where((i + by >= 0) & (i + by < tokens + later), grown, 0.0)
            if by == 0:
                own = tl.where(i < tokens, grown, 0.0)
                if dbias is not None:
                    sum_bias += own
                if dweight is not None:
                    for tap in tl.static_range(W):
                        seen = own * _seen(
                            x, before, None, documents, i, tap - (W - 1), 0, c, row, x_token, x_channel, tokens, 0,
                            channels, W,
                        )  # fmt: skip
                        if tap == 0:
                            sum_0 += seen
                        elif tap == 1:
                            sum_1 += seen
                        elif tap == 2:
                            sum_2 += seen
                        else:
                            sum_3 += seen
            if documents is not None:
                same = _document(documents, i, tokens, W) == _document(documents, i + by, tokens, W)
                grown = tl.where(same, grown, 0.0)
            total += tl.load(weight + c * W + (W - 1 - by), mask=c < channels, other=0.0).to(tl.float32) * grown
        inside = (i < tokens) & (c < channels)
        tl.store(dx + (row * tokens + i) * channels + c, total.to(dx.dtype.element_ty), mask=inside & (i >= 0))
        place = dbefore + (row * (W - 1) + i + (W - 1)) * channels + c
        tl.store(place, total.to(dx.dtype.element_ty), mask=inside & (i < 0))
    there = c < channels
    if dbias is not None:
        tl.store(dbias + program * channels + c, tl.sum(sum_bias, 0)[None, :], mask=there)
    if dweight is not None:
        dweight += program * W * channels + c
        for tap in tl.static_range(W):
            summed = sum_0 if tap == 0 else sum_1 if tap == 1 else sum_2 if tap == 2 else sum_3
            tl.store(dweight + tap * channels, tl.sum(summed, 0)[None, :], mask=there)
