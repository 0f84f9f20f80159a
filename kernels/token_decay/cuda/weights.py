"""v times its weights, by the kernels that read v (for heads that share q and k: shared.py, shared_gradients.py).

They make the product themselves, on v's way from shared memory to the matrix units, so that no tensor as large as v is
written and read. The kernel of the outputs can also add v itself to them, times a number a head or a head's column
(skip). The kernel of dv can leave the gradients of v itself, of the weights, and of a number a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.token_decay.cuda import shared, shared_gradients


def weighted_values(v: Tensor, weight: Tensor) -> None:
    """None: they take both."""


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of it."""
    return "in the kernels that read v, gradients of x, dt and D in that of dv (of D a number a head)"


def compile_for(
    step: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide: bool,
    reverse: bool,
    programs: int,
    device: torch.device,
    *,
    share: int,
) -> None:
    """Of a pass, forward or backward (reverse); see leetdist.kernels.constant_decay.cuda.hopper.compile_for."""
    if step == "skipped_outputs":
        shared.compile_skipped(rows, columns, dtype, device)
        return
    if reverse:
        for which in ("early_gradients", "late_gradients"):
            kind = dtype, wide, reverse, programs, device
            shared_gradients.compile_for(which, rows, columns, *kind, share=share, weighted=True)
        return
    for which in ("tile_states", "tile_outputs"):
        shared.compile_for(which, rows, columns, dtype, wide, reverse, programs, device, share, weighted=True)
