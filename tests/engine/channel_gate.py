"""An operator in one file: a gate a channel, `S_t = diag(exp g_t) S_{t-1} + k_t v_t^T` (GLA, arXiv 2312.06635, eq. 4).

With c the sums of g from the tile's start: `o_i = sum_{j<=i} sum_d q_id k_jd exp(c_id - c_jd) v_j + (q_i exp c_i) S`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.operators.base import Channel, TileOperator


class ChannelGate(TileOperator):
    """Inputs q, k, v and g (B, H, N, Dk), the log of the gate, <= 0."""

    tokens = ("q", "k", "v", "g")
    transition = Channel()

    def summary(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        c = g.cumsum(2)
        return torch.exp(c[:, :, -1]), (k * torch.exp(c[:, :, -1:] - c)).mT @ v

    def tile_outputs(self, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        c = g.cumsum(2)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        seen = torch.exp((c[:, :, :, None] - c[:, :, None]).masked_fill(later[..., None], float("-inf")))
        return (q[:, :, :, None] * k[:, :, None] * seen).sum(-1) @ v + (q * torch.exp(c)) @ state


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in the tensors' own dtype."""
    outputs = []
    for t in range(q.shape[2]):
        state = torch.exp(g[:, :, t])[..., None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(outputs, 2), state
