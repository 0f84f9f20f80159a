"""The recurrence, token by token, the state on chip.

Algorithm: `S = gamma S + k_t v_t^T`, `o_t = q_t^T S` for one token after the other, in parallel over tiles and columns;
the state at a tile's start comes from the scan over tiles.
Time: O(N Dk Dv); memory: O(Dk Dv) a tile beside inputs and outputs.
Backends: CUDA C++ (CUDA cores, fp32 arithmetic for every dtype), PyTorch. Backward: its own, the same kernels in both
directions of time; tile states and the gradient of log_decay are the block kernels'. Works under `group=`.

Source: Fast Transformers with Clustered Attention, arXiv 2007.04825 (causal product); with decay: LeetDecoding, arXiv
2501.02573.
"""

OUTPUTS = "token_outputs"
