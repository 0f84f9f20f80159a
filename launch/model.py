"""A small language model of decaying linear attention, over bytes unless told otherwise. Copy and change it.

    embedding -> N x (norm, LightningAttention or Mamba2, norm, gated MLP) -> norm -> head

No positions and no softmax: the decays alone say where a token is. So nothing in it knows about shards, but the
attention's operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leetdist.nn import LightningAttention, Mamba2

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


@dataclass(frozen=True)
class Config:
    """Sizes. `Config.preset("100m")` has 100 million parameters."""

    vocab: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 2
    hidden: int = 344
    """Width of the MLP."""
    decay: str = "tnl"
    learnable_decay: bool = False
    operator: str = "lightning"
    """What mixes tokens: "lightning", with a decay a head, or "mamba2", with a decay a token."""

    @staticmethod
    def preset(name: str, vocab: int = 256, operator: str = "lightning") -> Config:
        """ "mini" 0.3M parameters, "tiny" 0.9M (a laptop), "10m", "100m"."""
        sizes = {
            "mini": (128, 2, 2, 256),
            "tiny": (128, 4, 2, 344),
            "10m": (384, 6, 3, 1024),
            "100m": (768, 13, 6, 2048),
        }
        if name not in sizes:
            raise ValueError(f"the preset must be one of {list(sizes)}, got {name!r}")
        return Config(vocab, *sizes[name], operator=operator)


def mixer(config: Config, layer: int, group: Group | None) -> nn.Module:
    """The layer that mixes tokens."""
    if config.operator == "mamba2":  # as wide as its heads of lightning attention, and twice as many
        return Mamba2(config.dim, head_dim=config.dim // config.heads, state=64, group=group)
    if config.operator != "lightning":
        raise ValueError(f"the operator must be lightning or mamba2, got {config.operator!r}")
    return LightningAttention(
        config.dim, config.heads,
        decay=config.decay, layer=layer, layers=config.layers,
        learnable_decay=config.learnable_decay, group=group,
    )  # fmt: skip


class Block(nn.Module):
    """Pre-norm attention and a gated MLP, each added to the residual stream."""

    def __init__(self, config: Config, layer: int, group: Group | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = mixer(config, layer, group)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, keep: bool = False
    ) -> tuple[Tensor, Any]:
        """x (B, N, dim) and the attention's state, as its layer has it, both after this block; no state unless
        `keep`."""
        y = self.attention(self.attention_norm(x), state=state, return_state=keep, cu_seqlens=cu_seqlens)
        y, state = y if keep else (y, None)
        x = x + y
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), state


class LanguageModel(nn.Module):
    """Tokens (B, N) in, logits (B, N, vocab) out.

    Args:
        config: sizes.
        group: ranks that hold consecutive shards of the sequence; None takes the surrounding `sequence_parallel`.
            `leetdist.parallelize(model, mesh)` sets it later.
        checkpointing: recompute each block in the backward: activations of one block instead of all.

    >>> model = LanguageModel(Config(dim=32, layers=2, heads=2, hidden=64))
    >>> model(torch.zeros(1, 10, dtype=torch.long)).shape
    torch.Size([1, 10, 256])
    """

    def __init__(self, config: Config, *, group: Group | None = None, checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer, group) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What writes to the residual stream starts smaller, so that its variance does not grow with depth.
                depth = (2 * config.layers) ** -0.5 if name.endswith(("out_proj.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * depth)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits for this rank's tokens, (B, N, vocab)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x, _ = checkpoint(block, x, None, cu_seqlens, use_reentrant=False)
            else:
                x, _ = block(x, None, cu_seqlens)
        return self.head(self.norm(x))

    def step(self, tokens: Tensor, states: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Logits of the last token, (B, vocab), and each block's state: a prompt first, then one token at a time."""
        x = self.embedding(tokens)
        after: list[Any] = []
        for index, block in enumerate(self.blocks):
            x, state = block(x, states[index] if states else None, keep=True)
            after.append(state)
        return self.head(self.norm(x[:, -1])), after
