"""The oracles: two fp64 statements of the operator, written from the definition and from nothing else.

They share no code with the library, are slow on purpose, and every test compares with one of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _prepare(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All for every head; log_decay a token: (B or 1, H, N)."""
    heads = max(x.shape[1] for x in (q, k, v))
    q, k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
    if log_decay is None:
        log_decay = torch.zeros(heads, device=q.device)
    if log_decay.ndim == 1:
        log_decay = log_decay[None, :, None].expand(1, heads, q.shape[2])
    return q, k, v, log_decay.double()


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = gamma_t S_{t-1} + k_t v_t^T`, `o_t = scale q_t^T S_t`, token by token in fp64; differentiable.

    Shapes: q, k (B, H, N, Dk), v (B, H, N, Dv), each with H or fewer heads; log_decay (H,), or (B, H, N), natural log,
    or None; initial_state (B, H, Dk, Dv) or None. Returns o (B, H, N, Dv) and the last state (B, H, Dk, Dv), both fp64.

    Source: LeetDecoding, arXiv 2501.02573; RetNet, arXiv 2307.08621, eq. 6 (recurrent form).

    >>> q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    >>> o, state = recurrence(q, k, v, torch.tensor([-0.1, -1.0]))
    >>> o.shape, state.shape
    (torch.Size([1, 2, 5, 4]), torch.Size([1, 2, 4, 4]))
    """
    q, k, v, log_decay = _prepare(q, k, v, log_decay)
    gamma = torch.exp(log_decay)[..., None, None]
    batch, heads, tokens, dk = q.shape
    if initial_state is None:
        state = q.new_zeros(batch, heads, dk, v.shape[3])
    else:
        state = initial_state.double()
    outputs = []
    for t in range(tokens):
        state = gamma[:, :, t] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(scale * (q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(outputs, 2), state


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`scale ((Q K^T) . M) V + scale diag(m) Q S_0` in fp64, for all rows or for chosen ones; differentiable.

    `M_ij = gamma_{j+1} ... gamma_i` for `i >= j`, else 0; `m_i = gamma_1 ... gamma_i`. Shapes as in
    `recurrence`; rows: (R,) int64, which tokens' outputs to compute (all when None), so that a few rows of a long
    sequence stay affordable. Returns (B, H, R or N, Dv) fp64.

    Source: RetNet, arXiv 2307.08621, eq. 5 (parallel form).

    >>> q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    >>> torch.testing.assert_close(quadratic(q, k, v), recurrence(q, k, v)[0])
    """
    q, k, v, log_decay = _prepare(q, k, v, log_decay)
    tokens = torch.arange(q.shape[2], device=q.device)
    rows = tokens if rows is None else rows
    distance = rows[:, None] - tokens
    # Sums of the steps from j + 1 to i, for each row from i backwards: no differences, in which a strong one would cost
    # others their digits. What is masked is left out, not multiplied by 0: it may be a NaN, and 0 times a log-decay of
    # -inf is one.
    steps = torch.where(distance >= 0, log_decay[:, :, None], 0.0)
    steps = F.pad(steps[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    mask = torch.exp(torch.where(distance >= 0, steps, 0.0))
    scores = torch.where(distance >= 0, (q[:, :, rows] @ k.mT) * mask, 0.0)
    seen_bad = (~v.isfinite()).cumsum(2)[:, :, rows] > 0
    out = torch.where(seen_bad, torch.nan, scores @ torch.where(v.isfinite(), v, 0.0))
    if initial_state is not None:
        decay = torch.exp(log_decay.cumsum(2)[:, :, rows])[..., None]
        out = out + decay * (q[:, :, rows] @ initial_state.double())
    return scale * out


def relative_error(out: Tensor, reference: Tensor) -> float:
    """`||out - reference|| / ||reference||` in fp64: a pure number; NaN anywhere gives NaN, which passes no bound.
    ValueError if the shapes differ, for what is broadcast is not compared.

    >>> relative_error(torch.ones(4), torch.ones(4))
    0.0
    """
    if out.shape != reference.shape:
        raise ValueError(f"out must have reference's shape, {tuple(reference.shape)}, got {tuple(out.shape)}")
    out, reference = out.detach(), reference.detach().double()
    norm = torch.linalg.vector_norm(reference)
    difference = torch.linalg.vector_norm(out.to(reference.device).double() - reference)
    return float(difference / norm) if norm > 0 else float(difference)
