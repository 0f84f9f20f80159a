"""What decoding keeps of sequences that stop inside a tile, so that it goes on with the bits of one call.

The outputs of a tile are computed chunk by chunk, from the state that the walk carries (pytorch/walk.py); what the tile
adds to the state is summed apart, from zero; the fold takes both over at the tile's end. So whoever keeps the three,
and the tokens of the chunk that is open, computes the next token as one call does: a row of a product does not depend
on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OpenTiles:
    """The open tiles of `slots` sequences, of any ages; H heads, Hk of k, Hv of v. Changed in place.

    tile, chunk: tokens, powers of two; where they are equal, a chunk is a tile, and nobody needs `walked` and `own`.
    start: (slots, H, Dk, Dv) fp32, the state at the open tile's start.
    walked: the same shape, the walk's state at the open chunk's start.
    own: the same shape, the sum of the tile's own closed chunks.
    held: (slots, H, any), what the kernels read in place of `walked` until the chunk is closed, made of it by
        `leetdist.operators.opened.Opened.held`; None where they have no such form.
    k, v: (slots, Hk or Hv, chunk, Dk or Dv), the open chunk's tokens; rows behind them mean nothing.
    log_decay: (H,) fp32; or of a decay a token (slots, H, chunk), beside k and v.
    keep: (H,) fp32, what is left of the state before a full tile, as the fold rounds it; None for a decay a token.
    total: (slots, H) fp64, the log-decays of the tile's closed chunks; None for a constant decay.
    tokens: (slots,) int64, seen so far: they say where in its tile and chunk each sequence is.
    arrived: (slots,) int32, for kernels' own use: zeros between calls.
    """

    tile: int
    chunk: int
    start: Tensor
    walked: Tensor | None
    own: Tensor | None
    k: Tensor
    v: Tensor
    log_decay: Tensor
    keep: Tensor | None
    total: Tensor | None
    tokens: Tensor
    arrived: Tensor
    held: Tensor | None = None  # so that pools pickled before there was any are what they were

    @property
    def by_token(self) -> bool:
        return self.log_decay.ndim == 3

    @property
    def rows(self) -> dict[str, Tensor]:
        """The tensors with a row a slot, by name."""
        names = ("start", "walked", "own", "held", "k", "v", "log_decay", "total", "tokens")
        found = {name: getattr(self, name) for name in names if name != "log_decay" or self.by_token}
        return {name: x for name, x in found.items() if x is not None}

    @property
    def bytes_a_slot(self) -> int:
        return sum(x[0].numel() * x.element_size() for x in self.rows.values())


def rows_of_calls(
    slots: int, batch: int, tokens: int, device: torch.device, index: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, tokens kept, whether both exist) of each row of a decoding call, (B,) each; nothing is read on the host. A
    row that names what does not exist has slot 0 and keeps nothing."""
    rows = torch.arange(batch, device=device)
    which, kept = rows if index is None else index.long(), torch.full_like(rows, tokens)
    good = (which >= 0) & (which < slots)
    if lengths is not None:
        kept = lengths.long()
        good &= (kept >= 0) & (kept <= tokens)
    return torch.where(good, which, 0), torch.where(good, kept, 0), good


def writers(slots: Tensor, kept: Tensor) -> Tensor:
    """(B,): for each row the row that writes its slot. Rows that share a slot, of which one at most keeps tokens, all
    write what that one does."""
    writes = (slots[:, None] == slots) & (kept > 0)
    rows = torch.arange(len(slots), device=slots.device)
    return torch.where(writes.any(1), writes.int().argmax(1), rows)


def written(to: Tensor, source: Tensor, slots: Tensor | None = None) -> Tensor:
    """`to`, changed in place: all of it, or these slots. Tensors made in inference mode may only be changed there."""
    if to.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            return written(to, source, slots)
    return to.copy_(source) if slots is None else to.index_copy_(0, slots, source)
