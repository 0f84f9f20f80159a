"""v times its weights, in Triton, where no kernel of the pass makes the product for itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.runtime.triton_launch import launch

ELEMENTS = 4096  # of v that a program holds


def weighted_values(v: Tensor, weight: Tensor) -> Tensor:
    """See leetdist.kernels.token_decay.pytorch.block.weighted_values."""
    batch, heads, tokens, width = v.shape
    out = torch.empty(batch, tokens, heads, width, dtype=v.dtype, device=v.device).transpose(1, 2)
    columns = triton.next_power_of_2(width)
    block = max(1, ELEMENTS // columns)
    if out.numel():
        launch(
            _weighted_values,
            (batch * heads * ceil_div(tokens, block),),
            (v, weight, out, *v.stride(), *weight.stride(), *out.stride()[:3], tokens, heads, width),
            {"TOKENS": block, "COLUMNS": columns},
        )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _weighted_values(
    v, weight, out, v_batch, v_head, v_token, v_column, weight_batch, weight_head, weight_token,
    out_batch, out_head, out_token, tokens, heads, width, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Neighbouring programs take neighbouring heads, which lie side by side in memory."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, TOKENS)
    batch, head, first = program // heads // blocks, program % heads, program // heads % blocks * TOKENS
    i, j = first + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    inside = (i < tokens)[:, None] & (j < width)[None, :]
    by = tl.load(weight + batch * weight_batch + head * weight_head + i * weight_token, mask=i < tokens, other=0.0)
    v += batch * v_batch + head * v_head + i[:, None] * v_token + j[None, :] * v_column
    values = tl.load(v, mask=inside, other=0.0).to(tl.float32) * by[:, None]
    out += batch * out_batch + head * out_head + i[:, None] * out_token + j[None, :]
    tl.store(out, values.to(out.dtype.element_ty), mask=inside)
