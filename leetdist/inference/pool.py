"""The states of many requests in one tensor, each at its own age."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from leetdist.arguments import as_bool
from leetdist.inference.checks import check_count, host_values
from leetdist.inference.exact import exact_advance, open_tiles, rows_of, taken
from leetdist.inference.state import State
from leetdist.inference.state_checks import check_like, check_whole
from leetdist.inference.steps import advance
from leetdist.kernels.common.open_tiles import written


class StatePool:
    """Slots for the states of many requests of one operator, which decode together wherever their slots are.

    Requests come (`put`), fork, and go (`take`, `release`) while others decode. A step names its slots by index and
    changes them in place, so that nothing is gathered. One CUDA graph of a step serves any requests: write their slots
    into the captured index, and `pool.idle`, with length 0, for the rows that are left over.

    Args:
        slots: how many requests fit.
        like: a `State` of the operator: its shapes, decay, scale and device are the pool's.
        exact: keep what it takes to decode with the bits of one call: the output of a token is, with torch.equal, what
            `linear_attention(..., method="block", tile=like.tile)` gives for it, after any prefill in any pieces on any
            number of ranks, in any slot of any batch, however many tokens a step takes. States must come from a
            `stream` (or an exact pool) of that tile. See below for the memory.
        dtype: of the states: fp32 (default), or bf16 for half the memory and traffic. Rounding a state to bf16 after
            every token costs accuracy, more the slower the decay: against fp64, 2,048 decoded outputs are off by
            0.3% with a memory of 8 tokens (log decay -1/8), 1.3% with 128, 4% with 2,048 and without decay, and by
            half of it at four tokens a call (fp32: 2e-6; tests/inference/test_inference_decode.py holds them to it).
            An exact pool has fp32 states (fp64 for fp64 inputs).

    Memory: a slot takes one fp32 state. A slot of an exact pool takes three (the state at the open tile's start, that
    at the open chunk's start, and what the tile adds), and the keys and values of a chunk of 64 tokens (128 on a CPU):
    with heads of 128 in bf16 that is 64 + 64 + 64 + 32 KiB a head, instead of 64. Where the tile is one chunk long, one
    state is enough: 64 + 32 KiB. An exact step reads one state and the open tokens, and writes new tokens only; at a
    chunk's end it writes states. On Hopper the state at the open chunk's start is kept rounded as well, as products
    take it (32 KiB more), and a step reads that one alone.

    Attributes:
        states: (slots + 1, H, Dk, Dv), the last one being `idle`; of an exact pool those at the open tiles' starts.
        open: `OpenTiles` (leetdist.kernels.common.open_tiles), what an exact pool holds; else None.
        tokens: (slots + 1,) int64 on the device, each slot's age in tokens.
        idle: the slot that belongs to nobody.

    Raises:
        ValueError: `slots` or `dtype` is wrong, a state is of another operator, or a slot is not in use.
        RuntimeError: `put` or `fork` finds no free slot.

    Source: paged caches, Kwon et al., arXiv 2309.06180, for a state that never grows.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
    >>> prompt = leetdist.stream(torch.tensor([-0.1, -1.0]), tile=16)
    >>> _ = prompt.push(q, k, v)
    >>> pool = leetdist.StatePool(8, like=prompt.state)
    >>> (first,) = pool.put(prompt.state)
    >>> slots = torch.tensor([first, *pool.fork(first, 2)])        # three continuations of one prompt
    >>> o = pool.steps(*(torch.randn(3, 2, 1, 16) for _ in range(3)), slots)
    >>> o.shape, pool.tokens[slots].tolist(), pool.take(first).tokens
    (torch.Size([3, 2, 1, 16]), [51, 51, 51], 51)

    >>> exact = leetdist.StatePool(8, like=prompt.state, exact=True)
    >>> slot = torch.tensor(exact.put(prompt.state))
    >>> more = [torch.randn(1, 2, 40, 16) for _ in range(3)]
    >>> o = torch.cat([exact.steps(*token, slot) for token in zip(*(x.split(1, 2) for x in more))], 2)
    >>> whole = [torch.cat(pair, 2) for pair in zip((q, k, v), more)]
    >>> one_call = leetdist.linear_attention(*whole, torch.tensor([-0.1, -1.0]), method="block", tile=16)
    >>> torch.equal(o, one_call[:, :, 50:])
    True
    """

    def __init__(self, slots: int, *, like: State, dtype: torch.dtype | None = None, exact: bool = False) -> None:
        slots = check_count("slots", slots, 1)
        check_whole("like", like)
        self.exact = as_bool("exact", exact)
        dtype = like.boundary.dtype if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be {like.boundary.dtype} or torch.bfloat16, got {type(dtype).__name__}")
        if self.exact and dtype != like.boundary.dtype:
            raise ValueError(f"dtype must be {like.boundary.dtype} in an exact pool, got {dtype}")
        if dtype not in (like.boundary.dtype, torch.bfloat16):
            raise ValueError(f"dtype must be {like.boundary.dtype} or torch.bfloat16, got {dtype}")
        self.open = open_tiles(slots + 1, like) if self.exact else None
        if self.open is None:
            shape = (slots + 1, *like.boundary.shape[1:])
            self.states = torch.zeros(shape, dtype=dtype, device=like.device)
            self.tokens = torch.zeros(slots + 1, dtype=torch.int64, device=like.device)
            self._rows = {"states": self.states, "tokens": self.tokens}
        else:
            self.states, self.tokens, self._rows = self.open.start, self.open.tokens, self.open.rows
        self.idle = slots
        self._like = like.select(torch.zeros(1, dtype=torch.int64, device=like.device))
        self._free = list(range(slots))  # a heap: pools with the same history give the same slots
        self._used: set[int] = set()

    def put(self, state: State) -> list[int]:
        """A slot for each row of the state, which is copied there."""
        check_whole("state", state)
        check_like(state, self._like)
        if self.open is None:
            rows = {"states": state.now, "tokens": torch.tensor(state.tokens, device="cpu").view(1)}
        else:
            rows = rows_of(state, self.open)
        return self._fill(rows, state.boundary.shape[0])

    def fork(self, slot: int, copies: int) -> list[int]:
        """`copies` more slots with what is in `slot`."""
        slot, copies = self._held(slot), check_count("copies", copies, 1)
        return self._fill({name: x[slot : slot + 1].clone() for name, x in self._rows.items()}, copies)

    def take(self, slot: int) -> State:
        """A copy of what is in a slot, to save or to move to another pool; the slot stays in use."""
        slot = self._held(slot)
        if self.open is not None:
            return taken(self._like, self.open, [slot])
        now = self.states[slot : slot + 1].to(self._like.boundary.dtype, copy=True)
        return self._like.after(now, int(self.tokens[slot]) - self._like.tokens)

    def take_all(self) -> State:
        """Of an exact pool all slots in use, in their order, as one state; ValueError where their ages differ."""
        if self.open is None or not self._used:
            raise ValueError("take_all is for an exact pool with slots in use")
        return taken(self._like, self.open, sorted(self._used))

    @property
    def tensors(self) -> list[Tensor]:
        """What the pool holds, each with a row a slot."""
        return list(self._rows.values())

    def release(self, slots: Iterable[int]) -> None:
        """The slots are free again: all of them, or with a ValueError none."""
        if not isinstance(slots, Iterable) or (isinstance(slots, Tensor) and slots.ndim != 1):
            raise ValueError(f"slots must be several slots, got {slots!r}")
        going = [self._held(slot) for slot in slots]
        if len(set(going)) < len(going):
            raise ValueError(f"slots must be all different, got {going}")
        for slot in going:
            self._used.remove(slot)
            heapq.heappush(self._free, slot)

    def steps(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        lengths: Tensor | None = None,
        *,
        log_decay: Tensor | None = None,
    ) -> Tensor:
        """`linear_attention_steps` on the slots in `index`, (B,), which then are `lengths` tokens older; log_decay:
        (B, H, T), where each token has a decay of its own, and only there.

        ValueError where a row names a slot that nobody holds, or keeps tokens in `idle`; on a GPU, where the values of
        `index` are not read, such a row changes what is in that slot, and nothing else.
        """
        if index is None:
            raise ValueError("index must be a tensor that names the slot of each row, got None")
        self._check_index(index, lengths)
        if (log_decay is not None) != self._like.by_token:
            raise ValueError(
                f"log_decay must {'' if self._like.by_token else 'not '}be given: the pool's states are of "
                f"{'a decay a token' if self._like.by_token else 'one decay for all tokens'}"
            )
        if self.open is not None:
            return exact_advance(q, k, v, self.open, log_decay, scale=self._like.scale, index=index, lengths=lengths)
        return advance(
            q, k, v, self.states, self._like.log_decay if log_decay is None else log_decay,
            scale=self._like.scale, index=index, lengths=lengths, ages=self.tokens,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """Factor of the outputs."""
        return self._like.scale

    def check_decay(self, log_decay: Tensor) -> None:
        """(H,): it is the pool's own; ValueError else. No values are compared on a GPU, or while a graph is traced."""
        mine = self._like.log_decay
        read = mine.is_cpu and log_decay.is_cpu and not torch.compiler.is_compiling()
        if mine.shape != log_decay.shape or (read and not torch.equal(mine, log_decay.to(mine.dtype))):
            raise ValueError("log_decay must be the pool's own, or not be given, got another")

    def _check_index(self, index: Tensor, lengths: Tensor | None) -> None:
        slots, kept = (host_values(x) if isinstance(x, Tensor) and x.ndim == 1 else None for x in (index, lengths))
        for row, slot in enumerate(slots or ()):
            # Slots that do not exist are the concern of linear_attention_steps.
            if slot == self.idle and (kept is None or any(kept[row : row + 1])):
                raise ValueError(f"lengths must be 0 where index is the pool's idle slot, {slot}, for row {row}")
            if 0 <= slot < self.idle and slot not in self._used:
                raise ValueError(f"index must name slots in use, got {slot} for row {row}: slot {slot} is not in use")

    @torch.no_grad()
    def _fill(self, rows: Mapping[str, Tensor], count: int) -> list[int]:
        """`count` slots, with these in them; one row of each is for all."""
        if count > len(self._free):
            raise RuntimeError(f"the pool has {len(self._free)} free slots of {self.idle}, and {count} are needed")
        slots = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(slots)
        index = torch.tensor(slots, dtype=torch.int64, device=self.states.device)
        for name, to in self._rows.items():
            written(to, rows[name].to(to).expand(count, *to.shape[1:]), index)
        return slots

    def _held(self, slot: int) -> int:
        slot = check_count("slot", slot, 0)
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use")
        return slot


__all__ = ["StatePool"]
