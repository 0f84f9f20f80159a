"""The recurrence, token by token, the state on chip.

Algorithm: `S = gamma S + k_t v_t^T`, `o_t = q_t^T S` for one token after the other, in parallel over tiles and columns;
the state at a tile's start comes from the scan over tiles.
Time: O(N Dk Dv); memory: O(Dk Dv) a tile beside inputs and outputs.
Backends: CUDA C++ (CUDA cores, fp32 arithmetic for every dtype), PyTorch. Backward: its own, the same kernels in both
directions of time; tile states of the PyTorch backend and the gradient of log_decay are the block kernels'. Works
under `group=`.

Source: Fast Transformers with Clustered Attention, arXiv 2007.04825 (causal product); with decay: LeetDecoding, arXiv
2501.02573.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from leetdist.methods import Composed, Kernels, block, cuda_serves

if TYPE_CHECKING:
    from leetdist.problem import Problem


def kernels(problem: Problem) -> Kernels:
    """CUDA C++ where cuda-core is installed, PyTorch's elsewhere."""
    base = block.kernels(problem)
    if cuda_serves(problem):
        from leetdist.kernels.cuda import token_scan

        outputs = partial(token_scan.tile_outputs, group=1)
        return Composed(base, tile_states=token_scan.tile_states, tile_outputs=outputs)
    from leetdist.kernels.pytorch import causal_dot_product

    return Composed(base, tile_outputs=causal_dot_product.tile_outputs)
