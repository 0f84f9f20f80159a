"""An open tile between two pieces of a stream: what a State says of it, changed in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leetdist.inference.state import NO_CHUNKS, State, no_tokens
from leetdist.kernels.common.settings import raw_settings


class Running:
    """A State that one stream moves on, inside a tile, by kernels that have an `open_piece`
    (constant_decay/cuda/open_chunk.py): no checks, no copies of states and a fixed sequence of launches a piece.

    States are copied before they are changed where somebody else may have them: the State that it began with, and
    whoever asked for `state()`.
    """

    def __init__(self, state: State) -> None:
        self._like, self._opened, self._settings = state, state.opened, raw_settings()
        self.tokens, self._closed, self._before = state.tokens, state.closed, state.k.shape[2]
        self._boundary, self._states, self._own = state.boundary, (state.walked, state.own), False
        chunk = self._opened.chunk
        kept = [x.new_empty(*x.shape[:2], chunk, x.shape[3]) for x in (state.k, state.v)]
        if self._before:
            for to, x in zip(kept, (state.k, state.v), strict=True):
                to[:, :, : self._before] = x
        self._kept = kept[0], kept[1]

    @staticmethod
    def can(state: State) -> bool:
        """Whether the kernels here go on from it, piece by piece."""
        return (
            state.method == "block"
            and not state.by_token
            and getattr(state.opened.module, "open_piece", None) is not None
            and state.k.shape[2] < state.opened.chunk
        )

    @property
    def still(self) -> bool:
        """Whether the environment asks for the same kernels as before."""
        return self._settings == raw_settings()

    @property
    def open(self) -> int:
        """Tokens in the open tile."""
        return self._closed + self._before

    def push(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The outputs of tokens that end in the tile, or with it."""
        like, opened, log_decay = self._like, self._opened, self._like.log_decay
        total = self._before + q.shape[2]
        ends = self._closed + total == like.tile
        full = total if ends else total - total % opened.chunk
        walked, own = self._states
        if not self._own and full:
            walked = (self._boundary if walked is None else walked).clone()
            own = torch.zeros_like(walked) if own is None else own.clone()
            self._states, self._own = (walked, own), True
        walked = self._boundary if walked is None else walked
        with torch.autocast(q.device.type, enabled=False):
            o, *kept = opened.module.open_piece(
                q, k, v, self._kept, walked, own if full else None, log_decay,
                tile=like.tile, at=self._closed, before=self._before, full=full, scale=like.scale,
            )  # fmt: skip
            if ends and own is not None:
                self._boundary = opened.fold(self._boundary, own, log_decay, None, like.tile)
        self._kept = kept[0], kept[1]
        self.tokens += q.shape[2]
        if ends:
            self._closed, self._before, self._states, self._own = 0, 0, (None, None), False
        else:
            self._closed, self._before = self._closed + full, total - full
        return o

    def state(self) -> State:
        """What came so far, for others to have."""
        self._own = False
        tokens = no_tokens(*self._kept, self._like.log_decay)
        if self._before:
            tokens |= {name: x[:, :, : self._before].clone() for name, x in zip("kv", self._kept, strict=True)}
        walked, own = self._states
        chunks: dict[str, Any] = {"closed": self._closed, "walked": walked, "own": own, "total": None}
        return replace(
            self._like, boundary=self._boundary, tokens=self.tokens, **tokens, **(chunks if self._closed else NO_CHUNKS)
        )


__all__ = ["Running"]
