"""Blocks of rows, the state carried from one to the next: the method the others are measured against.

Algorithm: a tile is walked in chunks of C tokens. Inside a chunk, the masked product `(Q K^T . M) V`; from before it,
`gamma^i q_i . S`; then `S = gamma^C S + (gamma^(C-i) k_i)^T v_i`.
Time: O(N (C + D) D) for head dimension D, all of it matrix products; memory: O(D^2) a tile beside inputs and outputs.
Backends: Triton, PyTorch. Backward: its own, the same kernels with other operands (pytorch/block.py).
Works under `group=`.

Source: LeetDecoding, arXiv 2501.02573, section 3 (block-based); RetNet, arXiv 2307.08621, eq. 7 (chunkwise form).
"""

from __future__ import annotations

from functools import cache, partial, update_wrapper
from typing import TYPE_CHECKING, cast

from leetdist.operators.methods import Kernels, compose, triton_serves

if TYPE_CHECKING:
    from leetdist.engine.problem import Problem


def kernels(problem: Problem) -> Kernels:
    """Triton's where they serve the problem, PyTorch's elsewhere."""
    if triton_serves(problem):
        return _triton(problem.precision)
    from leetdist.kernels.constant_decay.pytorch import block

    return cast(Kernels, block)


@cache
def _triton(precision: str | None) -> Kernels:
    from leetdist.kernels.constant_decay.triton import block

    if precision is None:
        return cast(Kernels, block)
    outputs, states = (
        update_wrapper(partial(function, precision=precision), function)
        for function in (block.tile_outputs, block.tile_states)
    )
    return compose(cast(Kernels, block), outputs, states)
