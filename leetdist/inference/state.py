"""What the operator remembers of a sequence, as an object: move it, fork it, go on from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from leetdist.api import linear_attention
from leetdist.arguments import as_bool, as_float, as_int, check_device, check_plain
from leetdist.engine.checks import describe
from leetdist.inference.checks import check_count, check_piece, check_rows, check_state
from leetdist.kernels.runtime.settings import raw_settings
from leetdist.operators.opened import Opened, opened_by
from leetdist.sequence.group import alone


@dataclass(frozen=True, eq=False, repr=False)
class State:
    """What decaying linear attention remembers of the sequences of a batch. `leetdist.stream` makes and takes it.

    The contract of exactness sums tokens tile by tile, and inside a tile chunk by chunk, so a sequence that stops
    there is more than one matrix: the state at the start of the open tile, what its closed chunks made of that and add
    to it, and the keys and values of the open chunk. Nothing in it is ever changed in place; it has the same content on
    every rank, so that any number of ranks can go on from it.

    Attributes:
        boundary: (B, H, Dk, Dv) fp32 (fp64 for fp64 inputs), the state at the start of the open tile.
        k: (B, H or a divisor, n, Dk), the keys of the open chunk, in the dtype of the inputs. Methods but "block", and
            kernels that compute a tile as a whole, have no chunks, and k is that of the open tile.
        v: (B, H or a divisor, n, Dv), its values.
        log_decay: as boundary, natural log: (H,), or of a decay a token (B, H, n), that of the open chunk.
        tokens: tokens seen so far.
        tile: tile length in tokens.
        scale: factor of the outputs.
        method: the local method, by name.
        closed: tokens in the open tile's closed chunks; without any, there is none of the following.
        walked: as boundary, the state that the outputs of the open chunk start from.
        own: as boundary, what the closed chunks add to the state.
        total: (B, H) fp64, of a decay a token, the sum of their log-decays.

    Raises:
        ValueError: the parts do not fit together; or, from `stream` and `load_states`, a state does not belong to the
            operator at hand.

    Source: the recurrent form of RetNet, arXiv 2307.08621, eq. 6; tiles as in Lightning Attention-2, arXiv
    2401.04658.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> prompt = leetdist.stream(torch.tensor([-0.1, -1.0]), tile=32)
    >>> _ = prompt.push(q, k, v)
    >>> four = prompt.state.fork(4)                      # one prompt, four continuations
    >>> four.tokens, four.k.shape, four.now.shape        # 96 tokens in the boundary state, 4 in the open tile
    (100, torch.Size([4, 2, 4, 16]), torch.Size([4, 2, 16, 16]))
    """

    boundary: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    tokens: int
    tile: int
    scale: float = 1.0
    method: str = "block"
    closed: int = 0
    walked: Tensor | None = None
    own: Tensor | None = None
    total: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in check_state(self).items():
            object.__setattr__(self, name, value)
        if self.log_decay.dtype != self.boundary.dtype:  # as a call takes it, and kernels read it
            object.__setattr__(self, "log_decay", self.log_decay.to(self.boundary.dtype))

    def __repr__(self) -> str:
        batch, heads, dk, dv = self.boundary.shape
        return (
            f"State(tokens={self.tokens}, B={batch}, H={heads}, Dk={dk}, Dv={dv}, {self.open} in an open tile of "
            f"{self.tile}, scale={self.scale}, method={self.method!r}, {self.boundary.dtype}, {self.device})"
        )

    @property
    def open(self) -> int:
        """Tokens in the open tile."""
        return self.closed + self.k.shape[2]

    @property
    def by_token(self) -> bool:
        """Whether each token has a decay of its own."""
        return self.log_decay.ndim == 3

    @property
    def device(self) -> torch.device:
        return self.boundary.device

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors with a row for each of the batch, by name."""
        found = {name: getattr(self, name) for name in TENSORS if name != "log_decay" or self.by_token}
        return {name: x for name, x in found.items() if x is not None}

    @property
    def opened(self) -> Opened:
        """Who computes the open tile, here."""
        shapes = tuple((x.shape[1], x.shape[3]) for x in (self.k, self.v))
        heads = self.boundary.shape[1]
        return _opened(heads, shapes, self.k.dtype, self.device, self.by_token, self.method, self.tile, raw_settings())

    @cached_property
    def now(self) -> Tensor:
        """(B, H, Dk, Dv): the state after the last token, which decoding starts from. Do not change it in place.

        The bits of one call's last state; but kernels that leave out what a full tile has forgotten (on a GPU, of a
        constant decay) round it otherwise in the heads that are past that.
        """
        if not self.open:
            return self.boundary
        with torch.no_grad():
            if self.walked is None or self.own is None:
                return self._after_tokens(self.boundary)
            opened = self.opened
            if opened.module is None:
                return self._after_tokens(self.walked)
            walked, own = self.walked.clone(), self.own.clone()
            total = None if self.total is None else self.total.clone()
            opened.advance(self.k, self.v, self.log_decay, self.closed, walked, own, total)
            after = opened.fold(self.boundary, own, self.log_decay, total, self.open)
            left_out = opened.left_out(self.log_decay)
            if left_out is None:
                return after
            past = (left_out > 0) & (left_out < self.open)
            return torch.where(past[:, None, None], walked, after)

    def _after_tokens(self, start: Tensor) -> Tensor:
        """The state after the open tokens, from that before them."""
        if not self.k.shape[2]:
            return start
        no_query = self.k.new_zeros(1).expand(*self.boundary.shape[:2], *self.k.shape[2:])
        return run(replace(self, boundary=start, **NO_CHUNKS), no_query, self.k, self.v, self.log_decay)[1]

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, scale: float, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """`linear_attention_step` on this state."""
        if as_bool("inplace", inplace):
            raise ValueError("inplace must be False with a State, in which nothing is changed; an exact StatePool is")
        if as_float("scale", scale) not in (1.0, self.scale):
            raise ValueError(f"scale must be the state's own, {self.scale}, or not be given, got {scale}")
        if isinstance(q, Tensor) and (q.ndim != 4 or q.shape[2] != 1):
            raise ValueError(f"q must hold one token, (B, H, 1, Dk), got shape {tuple(q.shape)}")
        if log_decay is not None:
            check_plain("log_decay", log_decay, "a tensor or None")
        if log_decay is not None and log_decay.ndim == 1:
            if not torch.equal(log_decay.to(self.log_decay), self.log_decay):
                raise ValueError("log_decay must be the state's own, or not be given")
            log_decay = None
        if self.by_token != (log_decay is not None):
            raise ValueError(f"log_decay must {'' if self.by_token else 'not '}be given, as with the tokens before")
        after, decay = (self.boundary, self.k, self.v), self.log_decay if log_decay is None else log_decay
        check_piece(q, k, v, decay, self.scale, self.tile, self.method, after=after)
        state, own = on_its_grid(self), () if log_decay is None else (log_decay,)
        with torch.no_grad():
            return into_open_tile(state, q, k, v, *own)

    def after(self, state: Tensor, tokens: int) -> State:
        """After `tokens` more tokens of decoding led to `state`; the tile grid begins anew at this token."""
        check_plain("state", state)
        tokens = as_int("tokens", tokens)
        parts = {**no_tokens(self.k, self.v, self.log_decay), **NO_CHUNKS}
        return replace(self, boundary=state, tokens=self.tokens + tokens, **parts)

    def fork(self, copies: int) -> State:
        """Each row `copies` times, one beside the other."""
        copies = check_count("copies", copies, 1)
        rows = torch.arange(self.boundary.shape[0], device=self.device)
        return self.select(rows.repeat_interleave(copies))

    def select(self, rows: Tensor) -> State:
        """These rows of the batch, (R,) int64, in this order."""
        check_rows(rows, self.boundary.shape[0])
        rows = rows.to(self.device)
        parts: dict[str, Any] = {name: x[rows] for name, x in self.parts.items()}
        return replace(self, **parts)

    def to(self, device: torch.device | str) -> State:
        """On another device."""
        device = check_device(device)
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.parts.items()}
        return replace(self, **{"log_decay": self.log_decay.to(device), **moved})


@lru_cache(maxsize=256)
def _opened(
    heads: int,
    shapes: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
    by_token: bool,
    method: str,
    tile: int,
    _settings: tuple[str | None, ...],
) -> Opened:
    """Of every push, which is short: what the state's shapes lead to. shapes: heads and size of k and v."""
    with torch.inference_mode(False):
        k, v = (torch.empty(1, own, 1, dim, dtype=dtype, device=device) for own, dim in shapes)
        gate = torch.empty((1, heads, 1) if by_token else (heads,), dtype=torch.float32, device=device)
    problem = describe(
        k.new_empty(1, heads, 1, k.shape[3]), k, v, gate, read_values=False,
        scale=1.0, initial_state=None, return_state=True, cu_seqlens=None, method=method, tile=tile,
    )  # fmt: skip
    return opened_by(problem, tile)


# The tensors of a state, of which those of closed chunks may be missing.
TENSORS = ("boundary", "k", "v", "log_decay", "walked", "own", "total")
NO_CHUNKS: dict[str, Any] = {"closed": 0, "walked": None, "own": None, "total": None}


def no_tokens(k: Tensor, v: Tensor, log_decay: Tensor) -> dict[str, Any]:
    """The parts of an open tile without tokens; no slices, which would keep all of a piece alive."""
    parts = {"k": k, "v": v, "log_decay": log_decay}
    return {name: x if x.ndim == 1 else x.new_empty(*x.shape[:2], 0, *x.shape[3:]) for name, x in parts.items()}


def run(state: State, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The operator from the state's boundary on, on this rank alone: outputs, and the state after them."""
    with alone():
        return linear_attention(
            q, k, v, log_decay,
            scale=state.scale, initial_state=state.boundary, return_state=True,
            method=state.method, tile=state.tile,
        )  # fmt: skip


def outputs_of(state: State, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The outputs of the open chunk's tokens and those behind them in its tile."""
    start = state.boundary if state.walked is None else state.walked
    if state.method == "block" and (opened := state.opened).module is not None:
        with torch.autocast(q.device.type, enabled=False):  # the kernels of the call below, without its questions
            return opened.outputs(q, k, v, start, log_decay, state.scale)
    with alone():
        return linear_attention(
            q, k, v, log_decay,
            scale=state.scale, initial_state=start, method=state.method, tile=state.tile,
        )  # fmt: skip


def with_open(state: State, k: Tensor, v: Tensor, log_decay: Tensor, more: int) -> State:
    """The state `more` tokens later, with these open in its tile, which they may fill; of them as few are kept as the
    kernels here can go on from: those of a chunk, or of a tile."""
    open_, tokens = state.closed + k.shape[2], state.tokens + more
    parts: dict[str, Any] = {"k": k, "v": v, "log_decay": log_decay}
    opened = state.opened if state.method == "block" else None
    if opened is None or opened.module is None or opened.chunk == state.tile:
        return replace(state, **parts, tokens=tokens)
    ends = open_ == state.tile
    full = k.shape[2] if ends else k.shape[2] // opened.chunk * opened.chunk
    if not (full or ends):
        return replace(state, **parts, tokens=tokens)
    if state.walked is None or state.own is None:
        walked, own = state.boundary.clone(), torch.zeros_like(state.boundary)
        total = walked.new_zeros(walked.shape[:2], dtype=torch.float64) if state.by_token else None
    else:
        walked, own = state.walked.clone(), state.own.clone()
        total = None if state.total is None else state.total.clone()
    gate = log_decay if log_decay.ndim == 1 else log_decay[:, :, :full]
    opened.advance(k[:, :, :full], v[:, :, :full], gate, state.closed, walked, own, total)
    # No slices, which would keep all of a piece alive.
    rest: dict[str, Any] = {name: x if x.ndim == 1 else x[:, :, full:].clone() for name, x in parts.items()}
    if ends:
        after = opened.fold(state.boundary, own, log_decay, total, state.tile)
        return replace(state, boundary=after, **rest, **NO_CHUNKS, tokens=tokens)
    closed = state.closed + full
    return replace(state, **rest, closed=closed, walked=walked, own=own, total=total, tokens=tokens)


def into_open_tile(state: State, q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> tuple[Tensor, State]:
    """The outputs of tokens that end in the open tile, or with it, and the state after them.

    The open chunk is computed again from its start. Its earlier rows stand in as zeros: an output depends on its own
    row of q alone. own: the tokens' decays, if each has one.
    """
    before, tokens = state.k.shape[2], q.shape[2]
    log_decay = state.log_decay
    k, v = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
    if own:
        log_decay = torch.cat((log_decay, own[0].to(log_decay.dtype)), 2)
    padded = torch.cat((q.new_zeros(*q.shape[:2], before, q.shape[3]), q), 2)
    if state.open + tokens == state.tile and not state.closed:
        o, after = run(state, padded, k, v, log_decay)
        parts = no_tokens(k, v, log_decay)
        return o[:, :, before:], replace(state, boundary=after, **parts, tokens=state.tokens + tokens)
    o = outputs_of(state, padded, k, v, log_decay)
    return o[:, :, before:], with_open(state, k, v, log_decay, tokens)


def on_its_grid(state: State) -> State:
    """The state, with a grid that the kernels here know: on another device, whose chunks are others, the grid begins
    anew, as bits are not the same there anyway."""
    if not state.closed:
        return state
    opened = state.opened
    if opened.module is not None and state.closed % opened.chunk == 0:
        return state
    return state.after(state.now, 0)
