"""Streaming prefill: a sequence of any length in pieces of any size, in constant memory, with the bits of one call."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.api import linear_attention
from leetdist.arguments import as_str, check_device, check_plain
from leetdist.inference.checks import PIECE, check_count, check_decay, check_piece, check_shards, plain_options
from leetdist.inference.pieces import Piece, as_one, as_piece, copied, kind_of, lengths_if_alike, reads_log_decay
from leetdist.inference.running import Running
from leetdist.inference.staging import Staging
from leetdist.inference.state import State, into_open_tile, no_tokens, on_its_grid, run
from leetdist.inference.state_checks import check_continues
from leetdist.inference.windows import Windows, whole_tiles_apart
from leetdist.operators.problem import state_dtype
from leetdist.sequence.grid import LARGEST_TILE
from leetdist.sequence.group import resolve

if TYPE_CHECKING:
    from leetdist.sequence.group import Group
    from leetdist.sequence.transport import Transport

# Tiles that a piece from elsewhere is cut into for the trip to the device: of 32 bf16 heads of 128, two windows of
# 65,536 tokens take 3.2 GB, and the copy of one (30 ms) hides its compute and all that the host does.
WINDOW_TILES = 8
MOST_KINDS = 64  # of pieces that a stream remembers


def stream(
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    tile: int | None = None,
    method: str = "auto",
    state: State | None = None,
    device: torch.device | str | None = None,
    group: Group | None = None,
) -> Stream:
    """`linear_attention` over a sequence that comes in pieces: any number of tokens, memory of one piece.

    The outputs are, bit for bit, those of one call over the whole sequence with the same `tile` and `method`, however
    it is cut.

    `stream.push(q, k, v)` takes a piece and returns its outputs at once. `stream.map(pieces)` does so for an iterator
    of pieces, and copies them to and from `device` while others are computed; with `window=` it computes many short
    pieces at a time. `stream.state` is what there is to keep: a `State`, to save, fork, decode from, or go on from with
    `stream(state=...)`.

    A piece that ends inside a tile costs up to a chunk of work again with the next one (64 or 128 tokens; with methods
    but "block" up to a tile). Where tokens come one by one, an exact `StatePool` has the same bits and does less.

    Args:
        log_decay: (H,) fp32, natural log, <= 0; None is no decay, or one that each piece brings for its tokens.
        scale: factor of the output.
        tile: tile length in tokens, a power of two >= 16. None: 4,096, what `linear_attention` chooses for itself for
            sequences of 32,768 tokens and more.
        method: a local method by name, one that works tile by tile. "auto" is "block", because the choice that
            `linear_attention` makes depends on the length of the whole sequence, which nobody knows yet.
        state: go on from here, with its decay, scale, tile and method: these arguments are not given with it.
        device: where to compute. None: where the pieces are. Pieces in host memory (pinned, for copies that overlap)
            go to a CUDA device window by window, and the outputs come back to the host.
        group: ranks that hold consecutive shards of each piece, cut on the tile grid; every rank ends with the same
            state. Pieces but the last have a multiple of `tile` tokens. None takes the surrounding
            `sequence_parallel`.

    Pieces: q, k (B, H, n, Dk), v (B, H, n, Dv), each with H heads or fewer, and for a decay a token also log_decay
    (B, H, n); outputs (B, H, n, Dv) in their dtype.

    Raises:
        ValueError: an argument or a piece is wrong, or does not continue what came before.

    Source: the chunked recurrence of RetNet, arXiv 2307.08621, eq. 7; LeetDecoding, arXiv 2501.02573.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> log_decay = torch.tensor([-0.01, -0.5])
    >>> stream = leetdist.stream(log_decay, tile=16)
    >>> parts = [stream.push(*piece) for piece in zip(*(x.split([7, 50, 1, 42], 2) for x in (q, k, v)))]
    >>> o, last = leetdist.linear_attention(q, k, v, log_decay, tile=16, method="block", return_state=True)
    >>> torch.equal(torch.cat(parts, 2), o), torch.equal(stream.state.now, last)
    (True, True)
    """
    if state is not None:
        check_continues(state, log_decay=log_decay, scale=scale, tile=tile, method=method)
        log_decay = None if state.by_token else state.log_decay
        scale, tile, method = state.scale, state.tile, state.method
    method = "block" if as_str("method", method) == "auto" else method
    options = plain_options(scale, LARGEST_TILE if tile is None else tile, method)
    if log_decay is not None:
        check_decay(log_decay)
    return Stream(log_decay, **options, state=state, device=device, transport=resolve(group))


class Stream:
    """One sequence (or a batch of one age) on its way through the operator; made by `stream`.

    `push(q, k, v)` takes the next n tokens, q, k (B, H, n, Dk), v (B, H, n, Dv), and returns their outputs, (B, H, n,
    Dv) in q's dtype; `push(q, k, v, log_decay)`, from the first piece to the last, those of a decay a token, (B, H, n);
    `map(pieces)` does so for an iterator of pieces. Nothing is differentiable.

    Attributes:
        state: the `State` after what came so far, to save, fork, decode from, or go on from with another stream.
        tokens: tokens seen so far.

    Raises:
        ValueError: a piece is wrong or does not continue what came before; `state` before the first piece.

    Source: as `stream`, the chunked recurrence of RetNet, arXiv 2307.08621, eq. 7.

    >>> import torch, leetdist
    >>> prompt = leetdist.stream(torch.tensor([-0.1, -1.0]), tile=16)
    >>> isinstance(prompt, leetdist.Stream), prompt
    (True, Stream(nothing pushed yet, tile=16, method='block'))
    >>> prompt.push(*(torch.randn(1, 2, 100, 16) for _ in range(3))).shape, prompt.tokens
    (torch.Size([1, 2, 100, 16]), 100)
    """

    def __init__(
        self,
        log_decay: Tensor | None,
        scale: float,
        tile: int,
        method: str,
        state: State | None,
        device: torch.device | str | None,
        transport: Transport | None,
    ) -> None:
        self.device = None if device is None else check_device(device)
        if state is not None and self.device is not None:
            state = state.to(self.device)
        self._state = None if state is None else on_its_grid(state)
        self._running: Running | None = None  # what `_state` is not yet, since the last piece
        self._options = (log_decay, scale, tile, method)
        self._transport = transport
        self._kinds: set[Hashable] = set()  # of pieces that were right, as far as checks look at them

    def __repr__(self) -> str:
        _, _, tile, method = self._options
        so_far = f"nothing pushed yet, {tile=}, {method=}" if self._state is None else repr(self.state)
        return f"Stream({so_far})"

    @property
    def state(self) -> State:
        """The state after what came so far; ValueError before the first piece."""
        if self._state is None:
            raise ValueError("stream.state: nothing was pushed yet, so its shape is not known")
        if self._running is not None:
            self._state = self._running.state()
        return self._state

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        now = self._running or self._state
        return 0 if now is None else now.tokens

    @property
    def _tile(self) -> int:
        return self._options[2] if self._state is None else self._state.tile

    @property
    def _open(self) -> int:
        now = self._running or self._state
        return 0 if now is None else now.open

    def push(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        """The outputs of the next n tokens, where the piece is."""
        piece = (q, k, v) if log_decay is None else (q, k, v, log_decay)
        device = self._staged(piece)
        if device is None:
            return self._here(piece)
        (o,) = self._staging(device).map(self._advance, [piece], self._lead)
        return o

    def map(self, pieces: Iterable[Piece], *, window: int | None = None) -> Iterator[Tensor]:
        """The outputs of each piece in turn. A piece may be overwritten once the next one is asked for.

        window: for short pieces of a long sequence whose outputs are not needed at once. They wait until so many tokens
        are there, and are computed in one call, up to the end of a tile. Each piece must stay as it is until its
        outputs are given. Slices of one tensor are not copied, nor are, on Hopper and with a decay a head, up to 232
        pieces of the same strides. `state` and `tokens` tell what is computed so far. Not for host memory, nor under a
        group.
        """
        iterable = hasattr(pieces, "__iter__") or hasattr(pieces, "__getitem__")  # as torch's map-style datasets have
        if not iterable or isinstance(pieces, (Tensor, str, bytes)):
            raise ValueError(f"pieces must be an iterable of (q, k, v), got {type(pieces).__name__}")
        given = map(as_piece, pieces)
        return self._each(given) if window is None else self._in_windows(given, check_count("window", window, 1))

    def _each(self, pieces: Iterator[Piece]) -> Iterator[Tensor]:
        first = next(pieces, None)
        if first is None:
            return
        everything, device = chain([first], pieces), self._staged(first)
        if device is None:
            yield from map(self._here, everything)
        else:
            yield from self._staging(device).map(self._advance, everything, self._lead)

    def _in_windows(self, pieces: Iterator[Piece], window: int) -> Iterator[Tensor]:
        if self._transport is not None:
            raise ValueError("window must be None under a group: shards of several pieces are no shards of one")
        first = next(pieces, None)
        if first is None:
            return
        q: Any = first[0] if first else None
        if self.device is not None and isinstance(q, Tensor) and q.device != self.device:
            raise ValueError(f"window must be None for pieces that are not on {self.device}, where they are computed")

        windows = Windows(self._check_all, self._advance_all, window, self._tile, self._lead)
        yield from windows.map(chain([first], pieces))

    def _check_all(self, pieces: list[Piece]) -> list[int]:
        """Each continues what came before; their tokens."""
        found = None if pieces and reads_log_decay(pieces[0]) else lengths_if_alike(pieces)
        for piece in pieces if found is None else pieces[:1]:
            self._check(piece)
        return [piece[0].shape[2] for piece in pieces] if found is None else found

    def _staged(self, piece: Piece) -> torch.device | None:
        """Where pieces such as this are copied to window by window, and their outputs from; None if they are not."""
        q: Any = piece[0] if piece else None
        there = self.device
        if there is None or there.type != "cuda" or not isinstance(q, Tensor) or q.device == there:
            return None
        return there

    def _staging(self, device: torch.device) -> Staging:
        return Staging(device, WINDOW_TILES * self._tile)

    def _lead(self) -> int:
        return -self._open % self._tile

    def _here(self, piece: Piece) -> Tensor:
        """The outputs of a piece, where it is."""
        with torch.no_grad():
            if self.device is None:
                return self._advance(*piece)
            # What holds no values stays as it is, for the checks that all ranks wait for to name it.
            moved = (x.to(self.device) if isinstance(x, Tensor) and not x.is_meta else x for x in piece)
            return self._advance(*moved).to(piece[0].device)

    def _advance(self, *piece: Tensor) -> Tensor:
        if self._transport is not None:
            return self._advance_shard(piece, self._transport)
        self._check(piece)
        tokens, tile = piece[0].shape[2], self._tile
        head = min(-self._open % tile, tokens)
        tail = (tokens - head) % tile
        if head == tokens or tail == tokens:
            return self._into_open_tile(piece)
        all_ways = (head, self._into_open_tile), (tokens - head - tail, self._whole_tiles), (tail, self._into_open_tile)
        ways = [(length, way) for length, way in all_ways if length]
        parts = zip(*(x.split_with_sizes([length for length, _ in ways], 2) for x in piece), strict=True)
        outputs = [way(part) for (_, way), part in zip(ways, parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def _advance_all(self, pieces: list[Piece], lengths: list[int]) -> Tensor:
        """Of pieces of so many tokens, which are checked, as of one."""
        columns = list(zip(*pieces, strict=True))
        whole = [as_one(x, lengths) for x in columns]
        apart = not self._open and any(x is None for x in whole)
        if apart and (found := whole_tiles_apart(self.state, columns, lengths)) is not None:
            self._now(found[1])
            return found[0]
        return self._advance(*(copied(x) if y is None else y for x, y in zip(columns, whole, strict=True)))

    def _whole_tiles(self, piece: Piece) -> Tensor:
        state = self.state
        o, boundary = run(state, *_with_decay(piece, state))
        self._now(replace(state, boundary=boundary, tokens=state.tokens + piece[0].shape[2]))
        return o

    def _into_open_tile(self, piece: Piece) -> Tensor:
        if self._running is None or not self._running.still:
            state = self.state
            if not Running.can(state):
                o, state = into_open_tile(state, *piece)
                self._now(state)
                return o
            self._running = Running(state)
        return self._running.push(*piece)

    def _now(self, state: State) -> None:
        self._state, self._running = state, None

    def _advance_shard(self, piece: Piece, transport: Transport) -> Tensor:
        """The whole tiles of the piece over all ranks; its short last tile where it is, and then known to all."""
        wrong: ValueError | None = None
        try:
            self._check(piece, transport.size)
        except ValueError as error:
            wrong = error
        mine = (piece[0].shape[2], self.tokens, self._open) if wrong is None else wrong
        with transport.call("agreement"):
            everyone = transport.gather_objects(mine, PIECE, fails=wrong is not None)
        owner, tail, whole = check_shards(everyone, transport.rank, self._tile)
        state, outputs = self.state, []
        last = tail if transport.rank == owner else 0
        begin = piece[0].shape[2] - last
        if whole:
            q, k, v, log_decay = _with_decay(tuple(x[:, :, :begin] for x in piece), state)
            o, boundary = linear_attention(
                q, k, v, log_decay,
                scale=state.scale, initial_state=state.boundary if transport.rank == 0 else None,
                return_state=True, method=state.method, group=transport, tile=state.tile,
            )  # fmt: skip
            state = replace(state, boundary=boundary, tokens=state.tokens + whole)
            outputs.append(o)
        if tail:
            q, *others = (
                x[:, :, begin:].contiguous() if last else x.new_zeros(*x.shape[:2], tail, *x.shape[3:]) for x in piece
            )
            others = [_from_owner(x, owner, transport) for x in others]
            transport.flush()
            o, state = into_open_tile(state, q, *others)
            outputs.append(o[:, :, tail - last :])
        self._now(state)
        return torch.cat(outputs, 2)

    def _check(self, piece: Piece, ranks: int = 1) -> None:
        """The piece continues what came before; the first one begins it."""
        kind = kind_of(piece)
        if kind in self._kinds:
            return
        given, scale, tile, method = self._options
        state = None if self._state is None else self.state
        if len(piece) not in (3, 4):
            what = f"{len(piece)} tensors" if len(piece) != 1 else f"one {type(piece[0]).__name__}"
            raise ValueError(f"a piece must be q, k, v and perhaps log_decay, got {what}")
        q, k, v, *own = piece
        for name, x in zip(("q", "k", "v", "log_decay"), piece, strict=False):
            check_plain(name, x)
        if own and own[0].ndim != 3:
            raise ValueError(f"log_decay of a piece must have shape (B, H, n), got {tuple(own[0].shape)}")
        if own and given is not None:
            raise ValueError("log_decay must not be given with a piece, the stream has one for all tokens")
        if state is not None and state.by_token != bool(own):
            raise ValueError(
                f"log_decay must {'' if state.by_token else 'not '}be given with this piece, as with those before it"
            )
        log_decay = own[0] if own else given if state is None else state.log_decay
        after = None if state is None else (state.boundary, state.k, state.v)
        check_piece(q, k, v, log_decay, scale, tile, method, ranks=ranks, after=after)
        if state is None:
            self._state = _begun(q, k, v, log_decay, scale, tile, method)
        if len(self._kinds) == MOST_KINDS:
            self._kinds.clear()
        if kind is not None:
            self._kinds.add(kind)


def _begun(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, tile: int, method: str) -> State:
    """The state before the first piece."""
    heads, dtype = max(x.shape[1] for x in (q, k, v)), state_dtype(q.dtype)
    if log_decay is None:
        log_decay = torch.zeros(heads, dtype=dtype, device=q.device)
    with torch.inference_mode(False):  # what is kept is nobody else's to change, and of use outside too
        if log_decay.ndim == 3:
            log_decay = log_decay.new_empty(log_decay.shape, dtype=dtype)  # of which no token is kept
        else:
            log_decay = log_decay.detach().to(q.device, dtype, copy=True)
    return State(
        boundary=torch.zeros(q.shape[0], heads, q.shape[3], v.shape[3], dtype=dtype, device=q.device),
        **no_tokens(k, v, log_decay), tokens=0, tile=tile, scale=scale, method=method,
    )  # fmt: skip


def _with_decay(piece: Piece, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A piece and what decays it."""
    q, k, v, *own = piece
    return q, k, v, own[0] if own else state.log_decay


def _from_owner(x: Tensor, owner: int, transport: Transport) -> Tensor:
    """`x` as the owner has it, on every rank."""
    what = "the open tile of this piece"
    if transport.rank != owner:
        return transport.receive(x, owner, what)
    for rank in transport.others():
        transport.send(x, rank, what)
    return x


__all__ = ["Stream", "stream"]
