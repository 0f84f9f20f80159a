"""What `mamba_chunk_scan_combined` asks for, checked once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leetdist.arguments import as_bool, as_float, as_int, check_plain, is_readable
from leetdist.sequence.documents import check_offsets, check_told_once


def check_limits(dt_limit: Any) -> None:
    """What dt is clamped to."""
    wanted = "dt_limit must be (least, most) with 0 <= least <= most"
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise ValueError(f"{wanted}, got {dt_limit!r}")
    if not 0 <= as_float("dt_limit", dt_limit[0]) <= as_float("dt_limit", dt_limit[1]):
        raise ValueError(f"{wanted}, got {dt_limit!r}")


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: Any,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: Any,
    dt_limit: Any,
    return_final_states: Any,
    return_varlen_states: Any,
    *,
    alone: bool,
) -> None:
    """What `linear_attention` does not look at, or would name by its own arguments."""
    check_plain("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must have shape (B, N, H, P), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    rows, tokens, heads, width = x.shape
    if not rows or not heads or not width:
        raise ValueError(f"x must have no empty dimension but N, got {tuple(x.shape)}")
    if alone and not tokens:
        raise ValueError("x: N is 0; a sequence needs at least one token")
    check_plain("B", B)
    if B.ndim != 4 or B.shape[:2] != x.shape[:2] or not B.shape[2] or heads % B.shape[2] or not B.shape[3]:
        raise ValueError(
            f"B must have shape (B, N, G, S) = ({rows}, {tokens}, a divisor of {heads}, at least 1), got "
            f"{tuple(B.shape)}"
        )
    groups, size = B.shape[2:]
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "dt": (dt, (rows, tokens, heads)),
        "A": (A, (heads,)),
        "C": (C, (rows, tokens, groups, size)),
        "z": (z, (rows, tokens, heads, width)),
        "dt_bias": (dt_bias, (heads,)),
        "D": (D, (heads, width) if isinstance(D, Tensor) and D.ndim == 2 else (heads,)),
        "seq_idx": (seq_idx, (rows, tokens)),
    }
    optional = ("z", "dt_bias", "D", "seq_idx")
    for name, (y, shape) in shapes.items():
        if y is None and name in optional:
            continue
        check_plain(name, y, "a tensor or None" if name in optional else "a tensor")
        if tuple(y.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} beside x of shape {tuple(x.shape)}, got {tuple(y.shape)}")
    for name, y in (("B", B), ("C", C), ("z", z)):
        if y is not None and y.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype, {x.dtype}, got {y.dtype}")
    if initial_states is not None:
        check_plain("initial_states", initial_states, "a tensor or None")
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, x)
    for name, y in (("dt", dt), ("A", A), ("dt_bias", dt_bias), ("D", D), ("initial_states", initial_states)):
        if y is not None and not y.is_floating_point():
            raise ValueError(f"{name} must be floating, got {y.dtype}")
    beside = {"B": B, "initial_states": initial_states} | {name: y for name, (y, _) in shapes.items()}
    for name, y in beside.items():
        if y is not None and y.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {y.device}")
    values = A.detach().double() if is_readable(A) else None  # some narrow dtypes cannot be compared
    if values is not None and not bool((values <= 0).all() & values.isfinite().all()):
        raise ValueError(f"A must be finite and <= 0, as -exp(A_log) is, got {values.tolist()}")
    for name, y in (("dt", dt), ("dt_bias", dt_bias)):
        if y is not None and is_readable(y) and bool(y.isnan().any()):
            raise ValueError(f"{name} must be numbers, got NaN")
    _check_states_and_documents(x, size, initial_states, seq_idx, cu_seqlens)
    if chunk_size is not None and as_int("chunk_size", chunk_size) < 1:
        raise ValueError(f"chunk_size must be a positive number of tokens, or None, got {chunk_size}")
    as_bool("dt_softplus", dt_softplus)
    as_bool("return_final_states", return_final_states)
    if as_bool("return_varlen_states", return_varlen_states) and cu_seqlens is None:
        raise ValueError("return_varlen_states=True wants the documents' offsets, cu_seqlens, got None")
    check_limits(dt_limit)


def _check_states_and_documents(
    x: Tensor, size: int, initial_states: Tensor | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    check_told_once(seq_idx, cu_seqlens)
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seq_idx must be int32 or int64, got {seq_idx.dtype}")
    if initial_states is not None:
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        wanted = (rows, *x.shape[2:], size)
        if tuple(initial_states.shape) != wanted:
            raise ValueError(
                f"initial_states must have shape (B or documents, H, P, S) = {wanted}, got "
                f"{tuple(initial_states.shape)}"
            )
