"""The recurrence, token by token, the state on chip.

Algorithm: `S = gamma S + k_t v_t^T`, `o_t = q_t^T S` for one token after the other, in parallel over tiles and columns;
the state at a tile's start comes from the scan over tiles.
Time: O(N Dk Dv); memory: O(Dk Dv) a tile beside inputs and outputs.
Backends: CUDA C++ (CUDA cores, fp32 arithmetic for every dtype), PyTorch. Backward: its own, the same kernels in both
directions of time; tile states and the gradient of log_decay are the block kernels'. Works
under `group=`.

Source: Fast Transformers with Clustered Attention, arXiv 2007.04825 (causal product); with decay: LeetDecoding, arXiv
2501.02573.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leetdist.operators.methods import ONE_BY_ONE, Kernels, block, compose, cuda_serves

if TYPE_CHECKING:
    from leetdist.engine.problem import Problem


def kernels(problem: Problem) -> Kernels:
    """CUDA C++ where cuda-core is installed, PyTorch's elsewhere."""
    base = block.kernels(problem)
    if cuda_serves(problem):
        from leetdist.kernels.constant_decay.cuda import token_scan

        return compose(base, token_scan.tile_outputs_by_token, longest_tile=ONE_BY_ONE)
    from leetdist.kernels.constant_decay.pytorch import causal_dot_product

    return compose(base, causal_dot_product.tile_outputs, longest_tile=ONE_BY_ONE)
