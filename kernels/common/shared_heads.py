"""Sums over heads that share one, in Triton: what is added is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.runtime.triton_launch import launch

ELEMENTS = 2048  # of a program


def sum_shared(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """See leetdist.kernels.common.sums.sum_shared. x: (B, H, N, D), fp32."""
    batch, _, tokens, dim = x.shape
    if x.stride(1) < x.stride(2):
        out = torch.empty(batch, tokens, heads, dim, dtype=dtype, device=x.device).transpose(1, 2)
    else:
        out = torch.empty(batch, heads, tokens, dim, dtype=dtype, device=x.device)
    columns = triton.next_power_of_2(dim)
    rows = max(1, ELEMENTS // columns)
    if out.numel():
        launch(
            _sum_shared,
            (ceil_div(tokens, rows), batch * heads),
            (x, out, *x.stride(), *out.stride(), heads, tokens, dim),
            {"SHARE": x.shape[1] // heads, "ROWS": rows, "COLUMNS": columns},
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _sum_shared(
    x, out, x_batch, x_head, x_token, x_column, out_batch, out_head, out_token, out_column, heads, tokens, dim,
    SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    inside = (i < tokens) & (j < dim)
    x += batch * x_batch + head * SHARE * x_head + i * x_token + j * x_column
    total = tl.load(x, mask=inside, other=0.0)
    for share in tl.static_range(1, SHARE):
        total += tl.load(x + share * x_head, mask=inside, other=0.0)
    out += batch * out_batch + head * out_head + i * out_token + j * out_column
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)
