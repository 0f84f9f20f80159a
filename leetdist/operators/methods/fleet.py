"""FleetAttention: a sum over the rank of decayed cumulative sums.

Algorithm: with `K = [c_1 ... c_r]` and `Q = [b_1 ... b_r]` by columns,

    O = sum_i diag(b_i) DecayedCumsum(diag(c_i) V)

in parallel over tiles of tokens, columns of V and the rank. The state at a tile's start comes from the scan over tiles.
The sum over the rank has one fixed order (a thread's own indices first, then a tree of shuffles), so nothing is added
atomically and nothing races. Decays are relative to at most 16 tokens back, never to the sequence's start, so nothing
overflows. Tokens are added one by one, so tiles are at most 512 tokens long (`ONE_BY_ONE` of
leetdist.operators.implementations).
Time: O(N Dk Dv); memory: O(Dk Dv) a tile beside inputs and outputs.
Backends: CUDA C++ (CUDA cores, fp32 arithmetic for every dtype), Triton, PyTorch. Backward: its own, the same kernels
in both directions of time; tile states and the gradient of log_decay are the block kernels'. Works under `group=`.

Floor: a token, rank index and column cost a multiply by gamma, an fma into the state and an fma into the output. For
1 x 32 heads x 131,072 tokens x 128 x 128 that is 2.06e11 instructions of a lane; an H200 issues 132 x 128 a clock,
3.35e13 a second at 1.98 GHz: 6.16 ms. (Reading q, k, v and writing o in fp32 takes 2.0 ms.) Decaying once in 16
tokens leaves 2 1/16 operations; the tile states, which a parallel scan needs on top, cost one more, but on the tensor
cores. benchmarks/notes/fleet.md has what bounds it.

Source: LeetDecoding, arXiv 2501.02573, section 4 (FleetAttention), whose own kernel adds over the rank without
synchronisation.
"""

OUTPUTS = "fleet_outputs"
