"""What the kernels for Hopper are told of a call's tensors: maps for the copy engine, and where its tiles are."""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.memory import heads_of
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda.pieces import Operand
from leetdist.kernels.runtime.tensor_map import map_of


def operand_arguments(x: Operand, heads: int, kept: list[Tensor]) -> tuple[bytes, int]:
    """The map of x, or of a copy that has one, and how many heads share one of x's. A copy joins `kept`, which the
    caller holds until the launch: memory that nobody holds is given to others."""
    if not isinstance(x, Tensor):
        return x.map, heads // x.shape[1]
    found = map_of(x)
    if found is None:
        x = x.clone(memory_format=torch.contiguous_format)
        kept.append(x)
        found = map_of(x)
        assert found is not None
    return found, heads // x.shape[1]


def tile_arguments(tiles: Tiles, log_decay: Tensor, splits: int, *operands: Operand) -> tuple[int, ...]:
    """Where the tiles are, and the decays; of a decay a token also how many heads share an operand at most."""
    heads, table = heads_of(log_decay), 0 if tiles.regular else tiles.table(log_decay.device).data_ptr()
    found = log_decay.data_ptr(), table, heads, tiles.count, tiles.size, tiles.num_tokens, splits
    if log_decay.ndim == 1:
        return found
    return *found, *log_decay.stride()[:2], max(heads // x.shape[1] for x in operands)
