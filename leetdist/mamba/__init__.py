"""Mamba-2's operator: `linear_attention` with a decay a token, and what is around it.

- call: the function, and a token of it. checks: what it asks of its arguments. passes: what is around the attention, as
  functions of autograd's. repeats: the short way, one function with the attention, of calls on one GPU.
"""

from leetdist.mamba.call import around, decode, mamba_chunk_scan_combined
from leetdist.mamba.checks import check_limits

__all__ = ["around", "check_limits", "decode", "mamba_chunk_scan_combined"]
