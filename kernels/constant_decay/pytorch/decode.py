"""Decoding in plain PyTorch: a few tokens of many requests, on states that stay where they are.

Elementwise operations and sums over Dk, the same for every token, so T tokens at once give the bits of T calls of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.open_tiles import rows_of_calls, writers, written

Decay = tuple[Tensor, Tensor]


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, *, scale: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See leetdist.kernels.constant_decay.triton.step.step; this one is differentiable, without `out`."""
    dtype = q.dtype
    q, k, v = _operands(q, k, v, state)
    new = _moved(state, k, v, _decay(log_decay, 0, state.dtype))
    return _output(q, new, scale).to(dtype), new if out is None else written(out, new)


def steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
    ages: Tensor | None = None,
) -> Tensor:
    """`S_t = gamma S_{t-1} + k_t v_t^T`, `o_t = scale q_t^T S_t` for T tokens of B requests.

    q, k, v: (B, H or a divisor, T, Dk or Dv); log_decay: (H,), or (B, H, T), a token each; states: (slots, H, Dk, Dv),
    where row b works on slot `index[b]` (b without an index) and keeps what it is after `lengths[b]` tokens (T without
    lengths); ages: (slots,) int64, to which the tokens kept are added. All T outputs are computed in any case: (B, H,
    T, Dv) in q's dtype.

    No value is read on the host, so that a CUDA graph can hold it. So a row whose index is no slot, or whose length is
    not 0 to T, changes nothing and gets NaN.
    """
    tokens, dtype = q.shape[2], q.dtype
    slots, kept, good = rows_of_calls(states.shape[0], q.shape[0], tokens, q.device, index, lengths)
    before = states if index is None else states.index_select(0, slots)
    state = before.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    q, k, v = _operands(q, k, v, state)
    after, outputs = state, []
    for t in range(tokens):
        token = slice(t, t + 1)
        decay = _decay(log_decay, t, state.dtype)
        state = _moved(state, k[:, :, token], v[:, :, token], decay)
        outputs.append(_output(q[:, :, token], state, scale))
        after = state if lengths is None else torch.where((kept > t)[:, None, None, None], state, after)
    after = after.to(states.dtype)
    if index is None:
        written(states, after)
    else:
        written(states, after.index_select(0, writers(slots, kept)), slots)
    if ages is not None:
        written(ages, ages.index_add(0, slots, kept))
    return torch.cat(outputs, 2).masked_fill(~good[:, None, None, None], torch.nan).to(dtype)


def _operands(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> list[Tensor]:
    """For every head of the state, in its dtype."""
    return [x.to(state.dtype).repeat_interleave(state.shape[1] // x.shape[1], 1) for x in (q, k, v)]


def _decay(log_decay: Tensor | None, token: int, dtype: torch.dtype) -> Decay | None:
    """Of a token, (stays, factor), each (H, 1, 1) or, of a decay a token, (B, H, 1, 1), whose sum is gamma.

    gamma near 1 is rounded by up to 3e-8, the same way at every token, and 65,536 tokens would add that up to 1e-3. So
    the state of a slow decay stays, and `gamma - 1`, which has all its digits, is the factor of what is added to it.
    """
    if log_decay is None:
        return None
    if log_decay.ndim == 3:  # whose values nobody may have read
        log_decay = log_decay[:, :, token]
        log_decay = torch.where(log_decay <= 0, log_decay, torch.nan)
    exact = log_decay.double()[..., None, None]
    slow = exact > -0.7
    return slow.to(dtype), torch.where(slow, torch.expm1(exact), torch.exp(exact)).to(dtype)


def _moved(state: Tensor, k: Tensor, v: Tensor, decay: Decay | None) -> Tensor:
    """The state after one token; the small terms first, so that the sum is rounded once."""
    if decay is None:
        return state + k.mT * v
    stays, factor = decay
    return state * stays + (state * factor + k.mT * v)


def _output(q: Tensor, state: Tensor, scale: float) -> Tensor:
    return (q.mT * state).sum(2, keepdim=True) * scale
