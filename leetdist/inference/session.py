"""A language model in the middle of a text: its prompt over ranks, in pieces, then one token at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from leetdist.inference.attend import TILE
from leetdist.inference.checks import check_count, check_tokens
from leetdist.inference.pool import StatePool
from leetdist.inference.state import State
from leetdist.inference.state_checks import check_like, check_states
from leetdist.sequence.agreement import checksum, gathered
from leetdist.sequence.grid import LARGEST_TILE, default_tile, shard_lengths
from leetdist.sequence.group import alone, resolve, sequence_parallel
from leetdist.sequence.shard import cut, gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


class Recurrent(Protocol):
    """See `Session`: each block is called as `x, state = block(x, state, keep=True)`."""

    embedding: Any
    blocks: Any
    norm: Any
    head: Any


class Session:
    """A model and the states of its blocks after the tokens so far: of constant size, whatever their number.

    `prefill` takes a prompt in, shared by all ranks of the group; `step` a token a row, on each rank by itself; `fork`
    makes several continuations of each row; `keep` and `resume` are for `save_states` and `load_states`. `tokens` are
    those seen so far.

    Args:
        model: a stack of blocks like leetdist.launch.model.LanguageModel: `embedding`, `blocks`, `norm`, `head`, and in
            each block a `leetdist.nn` layer `attention` whose own group is None. One with a decay a token says so by
            `by_token = True`; any other has `log_decay(device)`, (H,). Both have `head_dim`, their Dk.
        group: ranks that share each piece of a prompt; every rank ends with the states of the whole. None takes the
            surrounding `sequence_parallel`.
        piece: tokens a rank takes in at a time: activations of that many, whatever the length of the prompt.

    Where the layers are exact (`exact=True`), so is the session: what a step gives for a token is what one call gives
    for it, as long as the model's other products do not depend on the number of tokens. All blocks have one tile then.

    Tokens are (B, N) int64, the same on every rank; logits (B, vocab) in the model's dtype; states fp32 (of Mamba-2's
    layers a named tuple each, which `keep` and `resume` do not take).

    Raises:
        ValueError: a prompt is empty, or not the same on every rank (then every rank raises), a step has no prompt
            before it or is not of one token a row, tokens are of another batch, or states are of another model.

    Source: the recurrent form of RetNet, arXiv 2307.08621, eq. 6; sharing a prompt as in LASP-2, arXiv 2502.07563.

    >>> import torch, leetdist
    >>> from leetdist.launch.model import Config, LanguageModel
    >>> session = leetdist.Session(LanguageModel(Config(dim=32, layers=2, heads=2, hidden=64)))
    >>> logits = session.prefill(torch.zeros(1, 100, dtype=torch.long))
    >>> session.step(logits.argmax(-1, keepdim=True)).shape, session.tokens
    (torch.Size([1, 256]), 101)
    """

    def __init__(self, model: Recurrent, group: Group | None = None, piece: int = 65_536) -> None:
        for part in ("embedding", "blocks", "norm", "head"):
            if not hasattr(model, part):
                raise ValueError(f"model must have {part}, which {type(model).__name__} has not: see Session")
        self.model, self.tokens = model, 0
        self.transport = resolve(group)
        self.piece = check_count("piece", piece, 1) * (1 if self.transport is None else self.transport.size)
        self.states: list[Any] = []
        self.exact = any(getattr(block.attention, "exact", False) for block in model.blocks)
        if self.exact:
            tiles = {getattr(block.attention, "tile", None) for block in model.blocks}
            if len(tiles) != 1 or not all(getattr(block.attention, "exact", False) for block in model.blocks):
                raise ValueError(
                    f"model must have exact layers of one tile, or none, got the tiles {sorted(map(str, tiles))}"
                )
            self._tile = tiles.pop() or TILE
        self._graph: _Graph | None = None

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Take in (B, N) tokens, the same on every rank; the next one's logits, (B, vocab), on every rank.

        All of them, or where a piece fails none."""
        self._check_prompt(tokens)
        before = self.states, self.tokens, self._graph
        try:
            self._graph = None
            if self.exact:
                self.states = _each(self.states, _as_state)
            for piece in self._pieces(tokens):
                last = self._piece(piece)
                self.tokens += piece.shape[1]
            return self._logits(last)
        except BaseException:
            self.states, self.tokens, self._graph = before
            raise

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Take in one token a row, (B, 1), on this rank alone; the next one's logits, (B, vocab). One that fails is not
        taken in.

        On a GPU the first call captures a CUDA graph, and the others replay it: they are one launch each, instead of
        some 300 for 13 blocks.
        """
        if not self.states:
            raise ValueError("tokens: a step goes on from a prompt, and there was none: call prefill or resume first")
        check_tokens(tokens, self._rows)
        if tokens.shape[1] != 1:
            raise ValueError(f"tokens must be one a row, (B, 1), got {tuple(tokens.shape)}; prefill takes several")
        if self.exact:
            self.states = _each(self.states, _as_pool)
        if tokens.device.type != "cuda":
            with _kept(self.states if self.exact else []):
                with alone():
                    last, states = self._run(tokens, self.states)
                logits = self._logits(last)
            self.states = states
        else:
            if self._graph is None or self._graph.tokens.shape != tokens.shape:
                self._graph = _Graph(self, tokens)
            logits = self._graph.replay(tokens)
        self.tokens += 1
        return logits

    def fork(self, copies: int) -> None:
        """Each row becomes `copies` rows, one beside the other."""
        copies = check_count("copies", copies, 1)
        if not self.states:
            raise ValueError("fork: no prompt was taken in, so there is nothing to continue")
        self.states = _each(self.states, lambda part: _forked(part, copies))
        self._graph = None

    def _check_prompt(self, tokens: Tensor) -> None:
        """It is one, and the same on every rank."""
        mine: Any
        try:
            check_tokens(tokens, self._rows)
            if not tokens.shape[1]:
                raise ValueError("tokens: N is 0; a prompt needs at least one token")
            if self.transport is None or self.transport.size == 1:
                return
            mine = (tuple(tokens.shape), self.tokens, checksum(tokens.long()))
        except ValueError as error:
            if self.transport is None:
                raise
            mine = error
        for rank, (shape, before, bits) in enumerate(everyone := gathered(mine, self.transport, "the prompt")):
            if (shape, before, bits) != tuple(everyone[0]):
                raise ValueError(
                    f"tokens must be the same on every rank, but those of rank {rank}, {shape} after {before}, are not "
                    f"rank 0's, {everyone[0][0]} after {everyone[0][1]}"
                )

    @property
    def _rows(self) -> int | None:
        """Rows of the batch; None before a prompt."""
        if not self.states:
            return None
        first = _parts_of(self.states[0])[0]
        if isinstance(first, StatePool):
            return first.idle
        return int(first.boundary.shape[0] if isinstance(first, State) else first.shape[0])

    def keep(self) -> dict[str, State]:
        """What `save_states` takes: a state for each block, by its name; ValueError before a prompt."""
        if not self.states:
            raise ValueError("keep: no prompt was taken in, so there are no states")
        self._check_files("keep", "save")
        if self.exact:
            return {_name(number): _as_state(state) for number, state in enumerate(self.states)}
        kept = {}
        for number, (block, state) in enumerate(zip(self.model.blocks, self.states, strict=True)):
            nothing = state.new_empty(*state.shape[:2], 0, state.shape[2])
            log_decay = nothing[..., 0]  # of no token
            if not getattr(block.attention, "by_token", False):
                log_decay = block.attention.log_decay(state.device).detach()
            kept[_name(number)] = State(
                boundary=state.clone(), k=nothing, v=nothing.new_empty(*state.shape[:2], 0, state.shape[3]),
                log_decay=log_decay, tokens=self.tokens, tile=LARGEST_TILE,
            )  # fmt: skip
        return kept

    def resume(self, states: Mapping[str, State]) -> None:
        """Go on from what `keep` gave, in any order, here or elsewhere; ValueError where it is another model's."""
        self._check_files("resume", "restore")
        check_states(states)
        if len(states) != len(self.model.blocks):
            raise ValueError(f"the states are of {len(states)} blocks, and the model has {len(self.model.blocks)}")
        missing = [name for name in map(_name, range(len(states))) if name not in states]
        if missing:
            raise ValueError(f"states must be named blocks.0, blocks.1, ...: no {missing[0]!r} among {sorted(states)}")
        kept = [states[_name(number)] for number in range(len(states))]
        for number, state in enumerate(kept):
            told = (state.tokens, state.boundary.shape[0])
            if told != (kept[0].tokens, kept[0].boundary.shape[0]):
                raise ValueError(
                    f"states must be of one moment: {_name(number)} has {told[0]} tokens of {told[1]} rows, blocks.0 "
                    f"{kept[0].tokens} of {kept[0].boundary.shape[0]}"
                )
        if self.exact:
            return self._resume_exactly(kept)
        before = self.states, self.tokens, self._graph
        self.states, self.tokens, self._graph = [state.now for state in kept], kept[0].tokens, None
        try:
            for block, theirs in zip(self.model.blocks, kept, strict=True):
                if not getattr(block.attention, "by_token", False):
                    heads = len(block.attention.log_decay(theirs.device))
                    if theirs.boundary.shape[1] != heads:
                        raise ValueError(f"the state has {theirs.boundary.shape[1]} heads, wanted {heads}")
            for block, mine, theirs in zip(self.model.blocks, self.keep().values(), kept, strict=True):
                check_like(theirs, mine)
                if theirs.boundary.shape[2] != block.attention.head_dim:
                    raise ValueError(
                        f"the state has Dk = {theirs.boundary.shape[2]}, wanted {block.attention.head_dim}"
                    )
        except ValueError:
            self.states, self.tokens, self._graph = before
            raise

    @property
    def in_files(self) -> bool:
        """Whether `keep` and `resume` take the model's states: each is one tensor, or a `State`."""
        return not any(hasattr(block.attention, "state_type") for block in self.model.blocks)

    def _check_files(self, name: str, verb: str) -> None:
        if not self.in_files:
            raise ValueError(
                f"{name}: the states of these layers are several tensors each: {verb} session.states yourself"
            )

    def _resume_exactly(self, kept: list[State]) -> None:
        for number, (block, state) in enumerate(zip(self.model.blocks, kept, strict=True)):
            layer = block.attention
            wanted = self._tile, layer.head_dim, bool(getattr(layer, "by_token", False))
            got = state.tile, state.boundary.shape[2], state.by_token
            if got != wanted:
                raise ValueError(f"{_name(number)} has (tile, Dk, a decay a token) = {got}, wanted {wanted}")
            if state.by_token:
                continue
            if not torch.equal(state.log_decay, layer.log_decay(state.device).detach().to(state.log_decay)):
                raise ValueError(f"{_name(number)} was made with another log_decay than the model's")
        self.states, self.tokens, self._graph = list(kept), kept[0].tokens, None

    def _pieces(self, tokens: Tensor) -> list[Tensor]:
        """Of an exact session what fills the open tile, then whole tiles."""
        if not self.exact:
            return list(tokens.split(self.piece, 1))
        head = min(-self.tokens % self._tile, tokens.shape[1])
        rest = tokens[:, head:].split(max(self._tile, self.piece // self._tile * self._tile), 1)
        return [piece for piece in (tokens[:, :head], *rest) if piece.shape[1]]

    def _piece(self, tokens: Tensor) -> Tensor:
        inside = self.exact and self.tokens % self._tile  # of a tile, from where there are no shards
        if self.transport is None or inside:
            with alone():
                last, self.states = self._run(tokens, self.states)
            return last[:, -1]
        if self.exact:
            lengths = shard_lengths(tokens.shape[1], self.transport.size, self._tile)
            with sequence_parallel(self.transport):
                last, self.states = self._run(cut(tokens, 1, lengths, self.transport), self.states)
            return gather_sequence(last, 1, self.transport)[:, -1]
        # A state enters on the first rank, where the sequence begins, and comes out on every one.
        states = self.states if self.transport.rank == 0 else []
        count = tokens.shape[1]
        lengths = shard_lengths(count, self.transport.size, default_tile(count))  # however few tokens are left
        with sequence_parallel(self.transport):
            last, self.states = self._run(cut(tokens, 1, lengths, self.transport), states)
        return gather_sequence(last, 1, self.transport)[:, -1]

    def _run(self, tokens: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """The last token's activations, (B, 1, dim), or (B, 0, dim) where this rank has none, and all states."""
        x, after = self.model.embedding(tokens), []
        for number, block in enumerate(self.model.blocks):
            x, state = block(x, states[number] if states else None, keep=True)
            after.append(state)
        return x[:, -1:], after

    def _logits(self, last: Tensor) -> Tensor:
        logits: Tensor = self.model.head(self.model.norm(last.flatten(0, last.ndim - 2)))
        return logits


def _name(number: int) -> str:
    return f"blocks.{number}"


def _each(states: list[Any], function: Callable[[Any], Any]) -> list[Any]:
    """The states with `function` of each of their parts: a layer's state is one, or a named tuple of some."""
    return [type(x)(*map(function, x)) if isinstance(x, tuple) else function(x) for x in states]


def _parts_of(state: Any) -> list[Any]:
    """Tensors, a State or a StatePool."""
    return list(state) if isinstance(state, tuple) else [state]


def _tensors(states: list[Any]) -> list[Tensor]:
    """All that steps change."""
    parts = [part for state in states for part in _parts_of(state)]
    return [x for part in parts for x in (part.tensors if isinstance(part, StatePool) else [part])]


@contextmanager
def _kept(states: list[Any]) -> Iterator[None]:
    """What changes inside, in place, is as before after an error."""
    held = [x.clone() for x in _tensors(states)]
    try:
        yield
    except BaseException:
        for x, old in zip(_tensors(states), held, strict=True):
            x.copy_(old)
        raise


def _as_pool(part: Any) -> Any:
    """A pool of a State's rows, to decode from; in order, each a slot."""
    if not isinstance(part, State):
        return part
    pool = StatePool(part.boundary.shape[0], like=part, exact=True)
    pool.put(part)
    return pool


def _as_state(part: Any) -> Any:
    return part.take_all() if isinstance(part, StatePool) else part


def _forked(part: Any, copies: int) -> Any:
    """Each row so many times."""
    part = _as_state(part)
    return part.fork(copies) if isinstance(part, State) else part.repeat_interleave(copies, 0)


class _Graph:
    """One step, captured: reads `tokens`, moves `states` on, leaves the logits."""

    def __init__(self, session: Session, tokens: Tensor) -> None:
        self.tokens = tokens.clone()
        session.states = _each(session.states, lambda part: part.clone() if isinstance(part, Tensor) else part)
        self.states = session.states
        held = [x.clone() for x in _tensors(self.states)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        layers = [block.attention for block in session.model.blocks]
        try:
            with torch.cuda.stream(side), alone():  # compiles what is to be compiled
                session._run(self.tokens, self.states)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            for layer in layers:
                layer.inplace = True
            with torch.cuda.graph(self.graph), alone():
                last, after = session._run(self.tokens, self.states)
                self.logits = session._logits(last)
                for state, new in zip(_tensors(self.states), _tensors(after), strict=True):
                    if new is not state:
                        state.copy_(new)
        finally:
            for layer in layers:
                layer.inplace = False
            torch.cuda.current_stream().wait_stream(side)
            for state, old in zip(_tensors(self.states), held, strict=True):
                state.copy_(old)

    def replay(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits.clone()


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A short text that says which weights these are: SHA-256 over names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        bits = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


__all__ = ["Session", "fingerprint"]
