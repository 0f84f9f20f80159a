"""An open tile between two pieces of a stream: what a State says of it, changed in place."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leetdist.inference.state import NO_CHUNKS, State, no_tokens
from leetdist.kernels.runtime.settings import raw_settings

WITHOUT = nullcontext()  # autocast, which takes 3 us to say so


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
        chunk, total = self._opened.chunk, None

        def kept(x: Tensor) -> Tensor:
            to = x.new_empty(*x.shape[:2], chunk, *x.shape[3:])
            to[:, :, : self._before] = x
            return to

        if state.by_token:
            total = self._no_decays() if state.total is None else state.total.contiguous()
        decays = kept(state.log_decay) if state.by_token else None
        self._kept = self._opened.module.Kept(kept(state.k), kept(state.v), decays, total)

    @staticmethod
    def can(state: State) -> bool:
        """Whether the kernels here go on from it, piece by piece."""
        if state.method != "block":
            return False
        opened = state.opened
        return getattr(opened.module, "open_piece", None) is not None and state.k.shape[2] < opened.chunk

    @property
    def still(self) -> bool:
        """Whether the environment asks for the same kernels as before."""
        return self._settings == raw_settings()

    @property
    def open(self) -> int:
        """Tokens in the open tile."""
        return self._closed + self._before

    def push(self, q: Tensor, k: Tensor, v: Tensor, *decays: Tensor) -> Tensor:
        """The outputs of tokens that end in the tile, or with it. decays: log_decay of a decay a token."""
        like, opened, log_decay = self._like, self._opened, self._like.log_decay
        if decays:
            log_decay = decays[0].to(log_decay.dtype).resolve_neg()  # any strides; values as they are in memory
        total = self._before + q.shape[2]
        ends = self._closed + total == like.tile
        full = total if ends else total - total % opened.chunk
        walked, own = self._states
        if not self._own and full:
            walked = (self._boundary if walked is None else walked).clone()
            own = torch.zeros_like(walked) if own is None else own.clone()
            self._states, self._own = (walked, own), True
        plain = torch.autocast(q.device.type, enabled=False) if torch.is_autocast_enabled(q.device.type) else WITHOUT
        with plain:
            o: Tensor
            o, self._kept = opened.module.open_piece(
                q, k, v, log_decay, self._kept, self._boundary if walked is None else walked, own if full else None,
                tile=like.tile, at=self._closed, before=self._before, full=full, scale=like.scale,
            )  # fmt: skip
            if ends and own is not None:
                self._boundary = opened.fold(self._boundary, own, log_decay, self._kept.total, like.tile)
        self.tokens += q.shape[2]
        self._closed, self._before = self._closed + full, total - full
        if ends:
            self._closed, self._states, self._own = 0, (None, None), False
            if like.by_token:
                self._kept = replace(self._kept, total=self._no_decays())
        return o

    def state(self) -> State:
        """What came so far, for others to have."""
        self._own = False
        like, kept, (walked, own) = self._like, self._kept, self._states
        decays = like.log_decay if kept.log_decay is None else kept.log_decay
        tokens = no_tokens(kept.k, kept.v, decays)
        if self._before:
            open_ = {"k": kept.k, "v": kept.v, "log_decay": decays}
            tokens = {name: x if x.ndim == 1 else x[:, :, : self._before].clone() for name, x in open_.items()}
        chunks: dict[str, Any] = {"closed": self._closed, "walked": walked, "own": own, "total": kept.total}
        return replace(
            like, boundary=self._boundary, tokens=self.tokens, **tokens, **(chunks if self._closed else NO_CHUNKS)
        )

    def _no_decays(self) -> Tensor:
        """What the log-decays of no token sum up to."""
        return self._boundary.new_zeros(self._boundary.shape[:2], dtype=torch.float64)


__all__ = ["Running"]
