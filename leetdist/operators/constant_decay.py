"""A constant decay a head: `S_t = gamma S_{t-1} + k_t v_t^T` (leetdist.linear_attention).

Source: LeetDecoding, arXiv 2501.02573; RetNet, arXiv 2307.08621, eqs. 5 to 7.
"""

from __future__ import annotations

from leetdist.operators.scalar_decay import ScalarDecay


class ConstantDecay(ScalarDecay):
    """log_decay: (H,). What `fold` is told of a tile is log_decay itself, for it rounds gamma^n, n tokens' decay."""

    heads = ("log_decay",)
