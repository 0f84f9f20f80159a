"""Blocks of rows, the state carried from one to the next: the method the others are measured against.

Algorithm: a tile is walked in chunks of C tokens. Inside a chunk, the masked product `(Q K^T . M) V`; from before it,
`gamma^i q_i . S`; then `S = gamma^C S + (gamma^(C-i) k_i)^T v_i`.
Time: O(N (C + D) D) for head dimension D, all of it matrix products; memory: O(D^2) a tile beside inputs and outputs.
Backends: CUDA C++ and Gluon (both for Hopper), Triton, PyTorch. Backward: its own, the same kernels with other operands
(kernels/constant_decay/pytorch/block.py).
Works under `group=`.

Source: LeetDecoding, arXiv 2501.02573, section 3 (block-based); RetNet, arXiv 2307.08621, eq. 7 (chunkwise form).
"""

OUTPUTS = "tile_outputs"
