"""What a call is, without its data: what operators, their kernels and the model of their costs are chosen by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from leetdist.sequence.encoding import plain


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states and log-decays beside inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@plain
@dataclass(frozen=True)
class Problem:
    """One call, without its data: what every rank must agree on, and this rank's number of tokens."""

    batch: int
    q_heads: int
    k_heads: int
    v_heads: int
    dk: int
    dv: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    method: str
    tile: int | None
    documents: tuple[int, ...] | None
    has_decay: bool
    return_state: bool
    grad_mode: bool
    needs_grad: bool
    needs_initial_grad: bool  # in a plan the same on all ranks: whether the first one's state needs it
    needs_decay_grad: bool
    has_initial: bool
    tokens: int
    precision: str | None = None
    lanes: int | None = None
    backend: str = ""  # under a group: ranks with other kernels would have other bits
    captured: bool = False  # by a CUDA graph, which no host launches
    operator: str = "constant_decay"
    weighted: bool = False  # v stands for itself times a number a token (leetdist.operators.token_decay)
    skipped: bool = False  # and itself times a number a head, or a head's column, is added to the outputs
    gated: bool = False  # and that by whoever takes the outputs, which it is then a gate of
    around: tuple[tuple[str, str], ...] = ()  # of a call around this one: what its ranks must have alike, by name
    factor_grads: bool = False  # whether gradients of v, its weight and that number are asked for, not of the product
    gates: tuple[tuple[int, ...], ...] = ()  # shapes of the operator's other inputs, without batch and tokens
    sees_grads: bool = True  # whether it is known what gradients will be asked for, which an op is not
    traced_grad: bool = False  # an op's own: whether autograd records it for q, k, v or log_decay
    traced_initial_grad: bool = False  # and for the initial state
    requires_grad: tuple[bool, ...] = ()  # of each tensor whose tokens, and their gradients, are sent onto the grid
    sharded_from: int | None = None  # tokens that shard_sequence was given for a shard as long as this one

    @property
    def heads(self) -> int:
        """Of the state: as many as the widest of q, k and v has."""
        return max(self.q_heads, self.k_heads, self.v_heads)

    @property
    def apart(self) -> int:
        """Into how many parts the heads can go, so that none shares a head of q, k or v with another."""
        return math.gcd(self.q_heads, self.k_heads, self.v_heads)
