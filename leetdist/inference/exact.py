"""Decoding with the bits of one call: states and slots, one into the other, and the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leetdist.engine.checks import describe
from leetdist.engine.inputs import canonical_tensors
from leetdist.engine.ops import define
from leetdist.inference.checks import check_steps
from leetdist.inference.state import NO_CHUNKS, State, on_its_grid, with_open
from leetdist.kernels.common.open_tiles import OpenTiles
from leetdist.operators.opened import MOST_TOKENS, OTHER_KERNELS, open_steps, opened_by
from leetdist.sequence.group import check_alone


def open_tiles(slots: int, like: State) -> OpenTiles:
    """Slots for states as `like`, which the kernels of its device go on from; ValueError where none do."""
    if like.method != "block":
        raise ValueError(f'exact=True is for method "block", got a state of method {like.method!r}')
    opened = like.opened
    chunk, (heads, dk, dv), device = opened.chunk, like.boundary.shape[1:], like.device

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(slots, *shape, dtype=dtype, device=device)

    state, parts = (heads, dk, dv), chunk < like.tile
    full, by_token = like.boundary.dtype, like.by_token
    decay = like.log_decay.to(full).contiguous()
    walked = zeros(*state, dtype=full) if parts else None
    return OpenTiles(
        tile=like.tile,
        chunk=chunk,
        start=zeros(*state, dtype=full),
        walked=walked,
        own=zeros(*state, dtype=full) if parts else None,
        held=None if walked is None else opened.held(walked),
        k=zeros(like.k.shape[1], chunk, dk, dtype=like.k.dtype),
        v=zeros(like.v.shape[1], chunk, dv, dtype=like.v.dtype),
        log_decay=zeros(heads, chunk, dtype=full) if by_token else decay,
        keep=opened.keep(decay),
        total=zeros(heads, dtype=torch.float64) if by_token and parts else None,
        tokens=zeros(dtype=torch.int64),
        arrived=zeros(dtype=torch.int32),
    )


def rows_of(state: State, open_: OpenTiles) -> dict[str, Tensor]:
    """What the state's rows are in slots."""
    if state.tokens % state.tile != state.open:
        raise ValueError(
            f"state: its tile grid begins at token {state.tokens - state.open} and not at the first: it was decoded "
            "without exact=True, so that what follows has no bits of one call"
        )
    device = open_.start.device
    state = state.to(device)
    if on_its_grid(state) is not state:
        raise ValueError(
            f"state: it was made on a device whose kernels close other chunks, {state.closed} tokens of an open tile, "
            f"than those here, of {open_.chunk}: what follows would not have its bits"
        )
    if state.k.shape[2] >= open_.chunk:  # of kernels with longer chunks
        state = with_open(state, state.k, state.v, state.log_decay, 0)
    room = open_.chunk - state.k.shape[2]
    rows = {
        "start": state.boundary,
        "walked": state.boundary if state.walked is None else state.walked,
        "own": torch.zeros_like(state.boundary) if state.own is None else state.own,
        "k": torch.nn.functional.pad(state.k, (0, 0, 0, room)),
        "v": torch.nn.functional.pad(state.v, (0, 0, 0, room)),
        "tokens": torch.tensor([state.tokens], device="cpu"),
    }
    if open_.held is not None:
        held = state.opened.held(rows["walked"])
        if held is None:
            raise ValueError(OTHER_KERNELS)
        rows["held"] = held
    if state.by_token:
        heads = state.boundary.shape[:2]
        rows["log_decay"] = torch.nn.functional.pad(state.log_decay, (0, room))
        rows["total"] = rows["k"].new_zeros(heads, dtype=torch.float64) if state.total is None else state.total
    return rows


def taken(like: State, open_: OpenTiles, slots: list[int]) -> State:
    """A copy of slots of one age as a state."""
    rows = {name: x[slots] for name, x in open_.rows.items()}
    ages = rows.pop("tokens").tolist()
    if len(set(ages)) != 1:
        raise ValueError(f"slots must be of one age to be one state, got {ages} tokens")
    (tokens, *_), count = ages, ages[0] % open_.chunk
    closed = tokens % open_.tile - count
    names = ("k", "v", "log_decay") if open_.by_token else ("k", "v")
    parts: dict[str, Any] = {name: rows[name][:, :, :count].clone() for name in names}
    chunks: dict[str, Any] = {name: rows.get(name) for name in ("walked", "own", "total")} if closed else NO_CHUNKS
    return replace(like, boundary=rows["start"], **parts, **{**chunks, "closed": closed}, tokens=tokens)


@torch.no_grad()
def exact_advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    open_: OpenTiles,
    log_decay: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """`linear_attention_steps` on the slots of an exact pool; log_decay: (B, H, T) of a decay a token, else None."""
    if torch.compiler.is_compiling():
        tensors: dict[str, Any] = {name: getattr(open_, name) for name in TENSORS}
        constant, tensors["log_decay"] = (None, open_.log_decay) if open_.by_token else (open_.log_decay, None)
        compiled: Tensor = _exact_op(
            q, k, v, log_decay, constant, open_.keep, *tensors.values(), open_.tile, open_.chunk, float(scale),
            index, lengths,
        )  # fmt: skip
        return compiled
    check_alone("linear_attention_steps")
    gate = open_.log_decay if log_decay is None else log_decay
    problem = describe(
        q, k, v, gate,
        scale=scale, initial_state=None, return_state=True, cu_seqlens=None, method="block", tile=open_.tile,
    )  # fmt: skip
    check_steps(q, k, v, open_.start, index, lengths)
    for name, x, held in (("k", k, open_.k), ("v", v, open_.v)):
        if (x.dtype, x.shape[1]) != (held.dtype, held.shape[1]):
            raise ValueError(
                f"{name} must have {held.shape[1]} heads of {held.dtype}, as the pool's states, got {x.shape[1]} of "
                f"{x.dtype}"
            )
    if q.shape[2] > MOST_TOKENS:
        raise ValueError(f"q must hold at most T = {MOST_TOKENS} tokens for an exact pool, got {q.shape[2]}")
    q, k, v, gate, _ = canonical_tensors(q, k, v, gate, None, None, None)
    with torch.autocast(q.device.type, enabled=False):
        return open_steps(
            opened_by(problem, open_.tile), q, k, v, open_, gate if log_decay is not None else None,
            scale=problem.scale, index=index, lengths=lengths,
        )  # fmt: skip


# What `OpenTiles` holds and steps change; its log_decay where that is a token's.
TENSORS = ("start", "walked", "own", "held", "k", "v", "log_decay", "total", "tokens", "arrived")


def _run_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    constant: Tensor | None,
    keep: Tensor | None,
    *more: Any,
) -> Tensor:
    held, (tile, chunk, scale, index, lengths) = dict(zip(TENSORS, more, strict=False)), more[len(TENSORS) :]
    if constant is not None:
        held["log_decay"] = constant
    open_ = OpenTiles(tile=tile, chunk=chunk, keep=keep, **held)
    return exact_advance(q, k, v, open_, log_decay, scale=scale, index=index, lengths=lengths)


_exact_op = define(
    "exact_steps",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? constant, Tensor? keep, Tensor(a!) start, "
    "Tensor(b!)? walked, Tensor(c!)? own, Tensor(d!)? held, Tensor(e!) open_k, Tensor(f!) open_v, "
    "Tensor(g!)? open_decay, Tensor(h!)? total, Tensor(i!) tokens, Tensor(j!) arrived, int tile, int chunk, "
    "float scale, Tensor? index, Tensor? lengths) -> Tensor",
    _run_exact,
    lambda q, k, v, log_decay, constant, keep, start, *_: q.new_empty(
        q.shape[0], start.shape[1], q.shape[2], start.shape[3]
    ),
)


__all__ = ["exact_advance", "open_tiles", "rows_of", "taken"]
