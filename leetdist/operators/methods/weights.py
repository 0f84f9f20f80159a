"""What stands between two tokens, and between tokens and the state, for methods that know no tiles: `weights_of`.

The sequence lies in segments of one length, (B, H, segments, length, D); all weights are within a segment.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.token_decay.pytorch.walk import running_sums


class Weights(Protocol):
    """Of a sequence, in the dtype of its log-decays; differentiable (twice)."""

    def pairs(self, length: int) -> Tensor:
        """The second token's in the first, (B or 1, H, segments or 1, length, length); 1 or more where it is later."""

    def from_start(self, length: int) -> Tensor:
        """Of the state at a segment's start in each token, (B or 1, H, segments or 1, length, 1)."""

    def to_end(self, length: int) -> Tensor:
        """Of each token in the state at its segment's end, shaped as `from_start`."""

    def across(self, length: int) -> Tensor:
        """Of the state at a segment's start in that at its end, (B or 1, H, segments or 1, 1, 1)."""


def weights_of(log_decay: Tensor) -> Weights:
    """Of a finite log_decay, (H,) or (B, H, N)."""
    return _Constant(log_decay) if log_decay.ndim == 1 else _ByToken(log_decay)


class _Constant:
    def __init__(self, log_decay: Tensor) -> None:
        self.log_decay = log_decay[:, None, None, None]

    def _powers(self, exponents: Tensor) -> Tensor:
        return torch.exp(self.log_decay * exponents)

    def _tokens(self, length: int) -> Tensor:
        return torch.arange(length, device=self.log_decay.device)[:, None]

    def pairs(self, length: int) -> Tensor:
        tokens = self._tokens(length)
        return self._powers((tokens - tokens.mT).clamp_min(0))

    def from_start(self, length: int) -> Tensor:
        return self._powers(self._tokens(length) + 1)

    def to_end(self, length: int) -> Tensor:
        return self._powers(self._tokens(length).flip(0))

    def across(self, length: int) -> Tensor:
        return torch.exp(self.log_decay * length)


class _ByToken:
    """Each weight is exp of the sum of its own steps, so that no other takes its digits."""

    def __init__(self, log_decay: Tensor) -> None:
        self.log_decay = log_decay

    def _segments(self, length: int) -> Tensor:
        """(B, H, segments, length) in fp64, zeros behind the last token."""
        tokens = self.log_decay.shape[2]
        count = max(1, ceil_div(tokens, max(1, length)))
        return pad(self.log_decay.double(), (0, count * length - tokens)).unflatten(2, (count, length))

    def _weight(self, exponent: Tensor) -> Tensor:
        return torch.exp(exponent).to(self.log_decay.dtype)

    def pairs(self, length: int) -> Tensor:
        behind = torch.ones(length, length, dtype=torch.bool, device=self.log_decay.device).tril(-1)
        steps = torch.where(behind, self._segments(length)[..., :, None], 0.0)
        return self._weight(running_sums(steps, -2))

    def from_start(self, length: int) -> Tensor:
        return self._weight(running_sums(self._segments(length), -1))[..., None]

    def to_end(self, length: int) -> Tensor:
        behind = pad(self._segments(length)[..., 1:], (0, 1))
        return self._weight(running_sums(behind.flip(-1), -1).flip(-1))[..., None]

    def across(self, length: int) -> Tensor:
        return self._weight(self._segments(length).sum(-1))[..., None, None]
