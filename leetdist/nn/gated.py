"""Linear attention whose heads learn, token by token, how much to forget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leetdist.arguments import as_float
from leetdist.kernels.common.elementwise import silu, softplus
from leetdist.nn.checks import as_size, check_exact, check_x, share_of
from leetdist.nn.operator import attended

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


class SimpleGLA(nn.Module):
    """Gated linear attention with one gate a head and token, a norm a head and a swish gate.

        q, k, v = q_proj(x), k_proj(x), v_proj(x)      log_decay = log(sigmoid(gk_proj(x))) / normalizer
        y = o_proj(norm(attention(q, k, v, log_decay)) silu(g_proj(x)))

    No position enters but through the decays, so a shard needs none.

    Args:
        dim: width of x.
        heads: number of heads; q and k have width dim / heads a head.
        value_dim: width of v over all heads; None is dim.
        normalizer: the root that is taken of each gate: the larger, the longer a head remembers when training starts.
        group: ranks that hold consecutive shards of the sequence; None takes the surrounding `sequence_parallel`, and
            without one computes on this device alone. `leetdist.parallelize` sets it.
        tile, exact: as for `LightningAttention`.

    Shapes: x and y (B, N, dim), in the parameters' dtype; a state (B, H, Dk, Dv) fp32.

    Raises:
        ValueError: heads do not divide dim or value_dim, normalizer is not positive, or x is not (B, N, dim).

    Source: Gated Linear Attention, arXiv 2312.06635, sections 4 and 4.4, with a gate a head instead of a channel, as in
    Mamba-2, arXiv 2405.21060, section 7.

    >>> import torch, leetdist
    >>> layer = leetdist.nn.SimpleGLA(64, heads=4)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    by_token = True
    """What `leetdist.Session` asks: the decays are the tokens', not the layer's."""

    inplace = False
    """Whether a step of decoding overwrites its state, as a captured graph wants."""

    def __init__(
        self,
        dim: int,
        heads: int,
        value_dim: int | None = None,
        *,
        normalizer: float = 16.0,
        group: Group | None = None,
        tile: int | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        dim, heads = as_size("dim", dim), as_size("heads", heads)
        value_dim = dim if value_dim is None else as_size("value_dim", value_dim)
        if not 0 < as_float("normalizer", normalizer) < math.inf:
            raise ValueError(f"normalizer must be positive and finite, got {normalizer}")
        self.dim, self.heads, self.head_dim = dim, heads, share_of("dim", dim, heads)
        self.normalizer, self.group = normalizer, group
        self.tile, self.exact = check_exact(tile, exact)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, value_dim, bias=False)
        self.gk_proj = nn.Linear(dim, heads)
        self.g_proj = nn.Linear(dim, value_dim, bias=False)
        self.norm = nn.RMSNorm(share_of("value_dim", value_dim, heads), eps=1e-5)
        self.o_proj = nn.Linear(value_dim, dim, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, H, N) fp32 (fp64 of an fp64 model), <= 0."""
        gate = self.gk_proj(x).transpose(1, 2)
        # Contiguous, as its gradient is: compiled, softplus' own backward takes strides for granted that differ then.
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32)).contiguous()
        return -softplus(-gate) / self.normalizer

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """x: (B, N, dim), this rank's shard under a group. state: (B, H, Dk, Dv) fp32, on the first rank."""
        check_x(x, self.dim, self.group)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        o, final = attended(
            self, q, k, v, self.log_decay(x),
            scale=q.shape[-1] ** -0.5, state=state, return_state=return_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        o = nn.functional.rms_norm(
            o.transpose(1, 2), self.norm.normalized_shape, self.norm.weight.to(o.dtype), self.norm.eps
        )
        y = self.o_proj(o.flatten(2) * silu(self.g_proj(x)))
        return y if final is None else (y, final)


__all__ = ["SimpleGLA"]
