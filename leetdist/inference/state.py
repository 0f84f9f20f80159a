"""What the operator remembers of a sequence, as an object: move it, fork it, go on from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from leetdist.api import linear_attention
from leetdist.inference.problem import check_count, check_rows, check_state
from leetdist.sequence.group import alone


@dataclass(frozen=True, eq=False, repr=False)
class State:
    """What decaying linear attention remembers of the sequences of a batch. `leetdist.stream` makes and takes it.

    The contract of exactness sums tokens tile by tile, so a sequence that stops inside a tile is more than one
    matrix: the state at the start of the open tile, and the keys and values of that tile. Nothing in it is ever
    changed in place; it has the same content on every rank, so that any number of ranks can go on from it.

    Attributes:
        boundary: (B, H, Dk, Dv) fp32 (fp64 for fp64 inputs), the state at the start of the open tile.
        k: (B, Hkv, n, Dk), the keys of the open tile, n < tile, in the dtype of the inputs.
        v: (B, Hkv, n, Dv), its values.
        log_decay: (H,) fp32, natural log.
        tokens: tokens seen so far.
        tile: tile length in tokens.
        scale: factor of the outputs.
        method: the local method, by name.

    Raises:
        ValueError: the parts do not fit together; or, from `stream` and `load_states`, a state does not belong to the
            operator at hand.

    Source: the recurrent form of RetNet, arXiv 2307.08621, eq. 6; tiles as in Lightning Attention-2, arXiv
    2401.04658.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> prompt = leetdist.stream(torch.tensor([-0.1, -1.0]), tile=32)
    >>> _ = prompt.push(q, k, v)
    >>> four = prompt.state.fork(4)                      # one prompt, four continuations
    >>> four.tokens, four.k.shape, four.now.shape        # 96 tokens in the boundary state, 4 in the open tile
    (100, torch.Size([4, 2, 4, 16]), torch.Size([4, 2, 16, 16]))
    """

    boundary: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    tokens: int
    tile: int
    scale: float = 1.0
    method: str = "block"

    def __post_init__(self) -> None:
        check_state(self)

    def __repr__(self) -> str:
        batch, heads, dk, dv = self.boundary.shape
        return (
            f"State(tokens={self.tokens}, B={batch}, H={heads}, Dk={dk}, Dv={dv}, {self.open} in an open tile of "
            f"{self.tile}, scale={self.scale}, method={self.method!r}, {self.boundary.dtype}, {self.device})"
        )

    @property
    def open(self) -> int:
        """Tokens in the open tile."""
        return self.k.shape[2]

    @property
    def device(self) -> torch.device:
        return self.boundary.device

    @cached_property
    def now(self) -> Tensor:
        """(B, H, Dk, Dv): the state after the last token, which decoding starts from. Do not change it in place."""
        if not self.open:
            return self.boundary
        no_query = self.k.new_zeros(1).expand(*self.boundary.shape[:2], *self.k.shape[2:])
        with torch.no_grad():
            return run(self, no_query, self.k, self.v)[1]

    def after(self, state: Tensor, tokens: int) -> State:
        """After `tokens` more tokens of decoding led to `state`; the tile grid begins anew at this token."""
        k, v = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (self.k, self.v))
        return replace(self, boundary=state, k=k, v=v, tokens=self.tokens + tokens)

    def fork(self, copies: int) -> State:
        """Each row `copies` times, one beside the other."""
        copies = check_count("copies", copies, 1)
        rows = torch.arange(self.boundary.shape[0], device=self.device)
        return self.select(rows.repeat_interleave(copies))

    def select(self, rows: Tensor) -> State:
        """These rows of the batch, (R,) int64, in this order."""
        check_rows(rows, self.boundary.shape[0])
        rows = rows.to(self.device)
        parts = {name: getattr(self, name)[rows] for name in ("boundary", "k", "v")}
        return replace(self, **parts)

    def to(self, device: torch.device | str) -> State:
        """On another device."""
        parts = {name: getattr(self, name).to(device) for name in ("boundary", "k", "v", "log_decay")}
        return replace(self, **parts)


def run(state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The operator from the state's boundary on, on this rank alone: outputs, and the state after them."""
    with alone():
        return linear_attention(
            q, k, v, state.log_decay,
            scale=state.scale, initial_state=state.boundary, return_state=True,
            method=state.method, tile=state.tile,
        )  # fmt: skip


__all__ = ["State"]
