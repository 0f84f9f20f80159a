"""Memory for what the kernels of a tile return, and states without memory."""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles


def heads_of(log_decay: Tensor) -> int:
    """Of (H,), or token by token (B, H, N, ...)."""
    return log_decay.shape[0 if log_decay.ndim == 1 else 1]


def empty_states(b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles) -> Tensor:
    """(B, H, tiles, Db, Dc) fp32."""
    shape = b.shape[0], heads_of(log_decay), tiles.count, b.shape[3], c.shape[3]
    return torch.empty(shape, dtype=torch.float32, device=b.device)


def empty_outputs(a: Tensor, c: Tensor, log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N, Dc) laid out in memory as a is: a (B, N, H, D) model gets its own layout back."""
    batch, heads, tokens, dim = a.shape[0], heads_of(log_decay), a.shape[2], c.shape[3]
    if a.stride(1) < a.stride(2):
        return torch.empty(batch, tokens, heads, dim, dtype=dtype, device=a.device).transpose(1, 2)
    return torch.empty(batch, heads, tokens, dim, dtype=dtype, device=a.device)


# One state of zeros for each kind, kept, by address; and the same by what it is.
_zeros: dict[int, Tensor] = {}
_zero_of: dict[tuple[torch.device, torch.dtype, int, int], Tensor] = {}


def zero_states(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """States (B, H, tiles, Dk, Dv) of zeros, which are all the same one in memory."""
    key = device, dtype, *shape[3:]
    zero = _zero_of.get(key)
    if zero is None:
        with torch.inference_mode(False):  # kept, and used in calls that record gradients too
            zero = _zero_of.setdefault(key, torch.zeros(1, 1, 1, *shape[3:], dtype=dtype, device=device))
        _zeros[zero.data_ptr()] = zero
    return zero.expand(shape)


def are_zeros(states: Tensor) -> bool:
    """Whether these are `zero_states`, or a transposed view of them."""
    return states.data_ptr() in _zeros


def step_of(states: Tensor) -> int:
    """Numbers from a tile's state to the next one's, head after head, of contiguous states, of some rows of such, or of
    `zero_states`."""
    return 0 if are_zeros(states) else states.stride(2)


def address_of(states: Tensor) -> int:
    """Of contiguous states; 0 of `zero_states`, which kernels in CUDA C++ know."""
    return 0 if are_zeros(states) else states.data_ptr()
