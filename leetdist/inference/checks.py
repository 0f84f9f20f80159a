"""What inference calls ask for, checked once.

The operator's own arguments are checked in leetdist.engine.checks; whether states belong together, or to a model, in
leetdist.inference.state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from leetdist.arguments import as_float, as_int, as_str, as_tile, check_plain, is_readable
from leetdist.engine.checks import DTYPES, METHODS, ONE_DEVICE, check_log_decay, check_written, describe
from leetdist.engine.ops import without_numbers
from leetdist.operators.problem import state_dtype
from leetdist.sequence.agreement import gathered

if TYPE_CHECKING:
    from leetdist.sequence.transport import Transport

PIECE = "the lengths of this piece"  # that the ranks of a stream wait for each other for


def check_count(name: str, value: Any, least: int) -> int:
    """A whole number: of slots, copies, tokens."""
    count = int(as_int(name, value))
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def check_steps(q: Tensor, k: Tensor, v: Tensor, states: Tensor, index: Tensor | None, lengths: Tensor | None) -> None:
    """The pooled states of a decoding call, and which of them its rows work on.

    The values of index and lengths are read where they are in host memory. On a GPU that would stop the stream, so
    there the kernels look: a row with a slot or length that does not exist changes nothing and gets NaN.
    """
    batch, _, tokens, dk = q.shape
    heads = max(x.shape[1] for x in (q, k, v))
    check_plain("states", states)
    if states.ndim != 4 or tuple(states.shape[1:]) != (heads, dk, v.shape[3]):
        raise ValueError(
            f"states must have shape (slots, H, Dk, Dv) = (slots, {heads}, {dk}, {v.shape[3]}), "
            f"got {tuple(states.shape)}"
        )
    if index is None and states.shape[0] != batch:
        raise ValueError(f"states must have a slot for each of the {batch} rows, or index be given, got {len(states)}")
    full = state_dtype(q.dtype)
    if states.dtype not in (full, torch.bfloat16):
        raise ValueError(f"states must be {full} or torch.bfloat16, got {states.dtype}")
    if states.device != q.device:
        raise ValueError(f"states must be on q's device, {q.device}, got {states.device}")
    check_written("states", states)
    for name, x in (("index", index), ("lengths", lengths)):
        if x is None:
            continue
        check_plain(name, x, "an int32 or int64 tensor")
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be an int32 or int64 tensor, got {x.dtype}")
        if x.shape != (batch,):
            raise ValueError(f"{name} must have shape (B,) = ({batch},), got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}")
    kept = host_values(lengths) or [tokens] * batch
    for row, length in enumerate(kept):
        if not 0 <= length <= tokens:
            raise ValueError(f"lengths must be from 0 to T = {tokens}, got {length} for row {row}")
    rows: dict[int, int] = {}
    for row, slot in enumerate(host_values(index) or ()):
        if not 0 <= slot < states.shape[0]:
            raise ValueError(f"index must be from 0 to {states.shape[0] - 1}, the last slot, got {slot} for row {row}")
        if kept[row] and rows.setdefault(slot, row) != row:
            raise ValueError(f"index must name a slot once, got {slot} for rows {rows[slot]} and {row}")


def host_values(x: Tensor | None) -> list[int] | None:
    """The values of a tensor in host memory; None where reading them would stop a stream or a trace."""
    if x is None or not is_readable(x):
        return None
    if x.layout is not torch.strided or x.dtype not in (torch.int32, torch.int64):
        return None  # no whole numbers to read: refused by name where that is checked
    return cast("list[int]", x.tolist())


def check_tokens(tokens: Any, rows: int | None) -> None:
    """Tokens of a batch, of as many rows as those before them."""
    check_plain("tokens", tokens, "an int64 tensor of shape (B, N)")
    if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
        got = f"{tokens.dtype} of {tuple(tokens.shape)}"
        raise ValueError(f"tokens must be an int64 tensor of shape (B, N), got {got}")
    if not tokens.shape[0] or tokens.shape[0] != (rows or tokens.shape[0]):
        raise ValueError(f"tokens must have {rows or 'at least one'} rows, as before them, got {tokens.shape[0]}")


def plain_options(scale: Any, tile: Any, method: Any) -> dict[str, Any]:
    """How a stream computes, each as the one type that stands for its value, which a file keeps."""
    scale, tile = as_float("scale", scale), as_tile(tile, "a power of two of at least 16 tokens")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    method = as_str("method", method, f"one of {', '.join(METHODS)}")
    if method in ONE_DEVICE:
        raise ValueError(f"method must be one that works tile by tile, got {method!r}: it takes a sequence as a whole")
    if method not in METHODS or method == "auto":
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return {"scale": scale, "tile": tile, "method": method}


def check_decay(log_decay: Tensor) -> None:
    """What can be said of a log_decay before the first piece."""
    check_plain("log_decay", log_decay, "a tensor or None")
    if log_decay.ndim != 1 or not log_decay.shape[0]:
        raise ValueError(f"log_decay must have shape (H,), got {tuple(log_decay.shape)}")
    _check_values("log_decay", log_decay)
    # Of a query's heads and device, all that is known.
    check_log_decay(log_decay, log_decay[None, :, None, None], log_decay.shape[0])


def _check_values(name: str, x: Tensor) -> None:
    if without_numbers(x):
        what = "on the meta device" if x.is_meta else "of FakeTensorMode"
        raise ValueError(f"{name} must have values, which a state is made of, got a tensor {what}")


def check_state(state: Any) -> dict[str, Any]:
    """The parts of a state fit together; values of its tensors are not read. Its plain values, by name."""
    for name in ("boundary", "k", "v", "log_decay"):
        x, ndims = getattr(state, name), (1, 3) if name == "log_decay" else (4,)
        if not isinstance(x, Tensor) or x.ndim not in ndims or x.layout != torch.strided:
            got = f"{x.layout} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a dense tensor of {' or '.join(map(str, ndims))} dimensions, got {got}")
        if x.device != state.boundary.device:
            raise ValueError(f"{name} must be on boundary's device, {state.boundary.device}, got {x.device}")
    boundary, k, v, log_decay = state.boundary, state.k, state.v, state.log_decay
    batch, heads, dk, _ = boundary.shape
    if 0 in boundary.shape:
        raise ValueError(f"boundary must have no empty dimension, got {tuple(boundary.shape)}")
    full = state_dtype(k.dtype)
    if boundary.dtype != full:
        raise ValueError(f"boundary must be {full} where k is {k.dtype}, got {boundary.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be of a dtype that linear_attention takes, got {x.dtype}")
        if (x.shape[0], x.shape[2]) != (batch, k.shape[2]):
            wanted = f"(B, heads, n, D) = ({batch}, heads, {k.shape[2]}, D)"
            raise ValueError(f"{name} must have shape {wanted}, as boundary and k have it, got {tuple(x.shape)}")
        if not x.shape[1] or heads % x.shape[1]:
            raise ValueError(f"{name} must have a number of heads that divides boundary's {heads}, got {x.shape[1]}")
    if log_decay.shape not in ((heads,), (batch, heads, k.shape[2])):
        raise ValueError(
            f"log_decay must have shape (H,) = ({heads},), or (B, H, n) = ({batch}, {heads}, {k.shape[2]}), got "
            f"{tuple(log_decay.shape)}"
        )
    if k.shape[3] != dk:
        raise ValueError(f"k must have boundary's Dk = {dk}, got shape {tuple(k.shape)}")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_decay must be float32 (float64 with fp64 inputs), got {log_decay.dtype}")
    options = plain_options(state.scale, state.tile, state.method)
    closed = check_chunks(state)
    if state.open >= state.tile:
        raise ValueError(f"k must hold less than a tile of {state.tile} tokens, got {state.open}")
    return {**options, "closed": closed, "tokens": check_count("tokens", state.tokens, state.open)}


def check_chunks(state: Any) -> int:
    """What there is of closed chunks; the tokens in them."""
    closed = check_count("closed", state.closed, 0)
    batch, heads, *_ = shape = tuple(state.boundary.shape)
    wanted = {"walked": shape, "own": shape, "total": (batch, heads)}
    for name, size in wanted.items():
        x = getattr(state, name)
        if not closed or (name == "total" and not state.by_token):
            if x is not None:
                raise ValueError(
                    f"{name} must be None where {'no chunk is closed' if not closed else 'a decay is a head'}"
                )
            continue
        dtype = torch.float64 if name == "total" else state.boundary.dtype
        if not isinstance(x, Tensor) or tuple(x.shape) != size or x.dtype != dtype or x.device != state.device:
            got = f"{x.dtype} of {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be {dtype} of shape {size} on {state.device}, got {got}")
    return closed


def check_path(path: Any) -> None:
    """The name of a file."""
    if not isinstance(path, (str, Path)) or not Path(path).name:
        raise ValueError(f"path must be the name of a file, a str or a Path, got {path!r}")
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        what = "a folder" if Path(path).is_dir() else "no folder for it"
        raise ValueError(f"path must be the name of a file in a folder that is there, got {what}: {path}")


def check_rows(rows: Tensor, batch: int) -> None:
    """Rows of a batch; their values, where they are in host memory."""
    check_plain("rows", rows, "an int32 or int64 tensor of shape (R,)")
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64) or rows.is_meta:
        got = f"{rows.dtype} of shape {tuple(rows.shape)} on {rows.device}"
        raise ValueError(f"rows must be an int32 or int64 tensor of shape (R,), got {got}")
    if not rows.shape[0]:
        raise ValueError("rows must name at least one row, got none")
    for row in host_values(rows) or ():
        if not 0 <= row < batch:
            raise ValueError(f"rows must be from 0 to {batch - 1}, the last row of the batch, got {row}")


def check_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    tile: int,
    method: str,
    *,
    ranks: int = 1,
    after: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """One piece of a stream; `after`: the state, keys and values that it continues."""
    describe(
        q, k, v, log_decay, ranks=ranks,
        scale=scale, initial_state=None if after is None else after[0], return_state=True,
        cu_seqlens=None, method=method, tile=tile,
    )  # fmt: skip
    _check_values("q", q)
    if after is None:
        return
    _, keys, values = after
    if k.dtype != keys.dtype:
        raise ValueError(f"this piece must have the dtype of those before it, {keys.dtype}, got {k.dtype}")
    for name, x, before in (("k", k, keys), ("v", v, values)):
        if x.shape[1] != before.shape[1]:
            raise ValueError(
                f"{name} must have as many heads as in the pieces before, {before.shape[1]}, got {x.shape[1]}"
            )


@contextmanager
def told_of_piece(transport: Transport | None) -> Iterator[None]:
    """Around checks that come before a stream's `push` over ranks: those that wait in it are told of a ValueError."""
    try:
        yield
    except ValueError as error:
        if transport is not None and transport.size > 1:
            gathered(error, transport, PIECE)
        raise


def check_shards(everyone: list[Any], rank: int, tile: int) -> tuple[int, int, int]:
    """A piece of a stream over ranks, of which each told its (tokens, tokens before, tokens in its open tile).

    Returns the rank that holds the piece's short last tile, the tokens in it, and the tokens in whole tiles; raises
    the same error on every rank.
    """
    for other, told in enumerate(everyone):
        if isinstance(told, ValueError):
            raise told if other == rank else ValueError(f"rank {other} has a bad piece: {told}")
    lengths = [tokens for tokens, _, _ in everyone]
    for other, (_, before, open_) in enumerate(everyone):
        if before != everyone[0][1]:
            raise ValueError(
                f"the ranks' streams are not at one token: rank {other} is at {before}, rank 0 at {everyone[0][1]}"
            )
        if open_:
            raise ValueError(
                f"under a group, pieces but the last must have a multiple of the tile length {tile} in tokens: the "
                f"pieces before this one ended {open_} tokens into a tile"
            )
    total = sum(lengths)
    if not total:
        raise ValueError("q: N is 0 on every rank; a piece needs at least one token")
    owner = max(other for other, tokens in enumerate(lengths) if tokens)
    if lengths[owner] < total % tile:
        raise ValueError(
            f"shard boundaries must lie on the tile grid: the last {total % tile} tokens of this piece are one tile "
            f"of {tile}, and rank {owner} has {lengths[owner]} of them"
        )
    return owner, total % tile, total - total % tile
