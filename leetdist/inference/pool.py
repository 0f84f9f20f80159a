"""The states of many requests in one tensor, each at its own age."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import torch
from torch import Tensor

from leetdist.inference.checks import check_count, host_values
from leetdist.inference.state import State, check_like, check_whole
from leetdist.inference.steps import advance
from leetdist.kernels.constant_decay.pytorch.decode import written


class StatePool:
    """Slots for the states of many requests of one operator, which decode together wherever their slots are.

    Requests come (`put`), fork, and go (`take`, `release`) while others decode; a step names its slots by index and
    changes them in place, so nothing is gathered, and a CUDA graph of a step serves any requests: write their slots
    into the captured index, and `pool.idle` with length 0 into what is left over.

    Args:
        slots: how many requests fit.
        like: a `State` of the operator: its shapes, decay, scale and device are the pool's.
        dtype: of the states: fp32 (default), or bf16 for half the memory and traffic. Rounding a state to bf16 after
            every token costs accuracy, more the slower the decay: against fp64, 2,048 decoded outputs are off by
            0.3% with a memory of 8 tokens (log decay -1/8), 1.3% with 128, 4% with 2,048 and without decay, and by
            half of it at four tokens a call (fp32: 2e-6; tests/inference/test_inference_decode.py holds them to it).

    Attributes:
        states: (slots + 1, H, Dk, Dv), the last one being `idle`.
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
    """

    def __init__(self, slots: int, *, like: State, dtype: torch.dtype | None = None) -> None:
        slots = check_count("slots", slots, 1)
        check_whole("like", like)
        dtype = dtype or like.boundary.dtype
        if dtype not in (like.boundary.dtype, torch.bfloat16):
            raise ValueError(f"dtype must be {like.boundary.dtype} or torch.bfloat16, got {dtype}")
        shape = (slots + 1, *like.boundary.shape[1:])
        self.states = torch.zeros(shape, dtype=dtype, device=like.device)
        self.tokens = torch.zeros(slots + 1, dtype=torch.int64, device=like.device)
        self.idle = slots
        self._like = like.select(torch.zeros(1, dtype=torch.int64, device=like.device))
        self._free = list(range(slots))  # a heap: pools with the same history give the same slots
        self._used: set[int] = set()

    def put(self, state: State) -> list[int]:
        """A slot for each row of the state, which is copied there."""
        check_whole("state", state)
        check_like(state, self._like)
        return self._fill(state.now.to(self.states), torch.tensor(state.tokens, device="cpu"), state.boundary.shape[0])

    def fork(self, slot: int, copies: int) -> list[int]:
        """`copies` more slots with what is in `slot`."""
        slot, copies = self._held(slot), check_count("copies", copies, 1)
        return self._fill(self.states[slot].clone(), self.tokens[slot].clone(), copies)

    def take(self, slot: int) -> State:
        """A copy of what is in a slot, to save or to move to another pool; the slot stays in use."""
        slot = self._held(slot)
        now = self.states[slot : slot + 1].to(self._like.boundary.dtype, copy=True)
        return self._like.after(now, int(self.tokens[slot]) - self._like.tokens)

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
        return advance(
            q, k, v, self.states, self._like.log_decay if log_decay is None else log_decay,
            scale=self._like.scale, index=index, lengths=lengths, ages=self.tokens,
        )  # fmt: skip

    def _check_index(self, index: Tensor, lengths: Tensor | None) -> None:
        slots, kept = (host_values(x) if isinstance(x, Tensor) and x.ndim == 1 else None for x in (index, lengths))
        for row, slot in enumerate(slots or ()):
            # Slots that do not exist are the concern of linear_attention_steps.
            if slot == self.idle and (kept is None or any(kept[row : row + 1])):
                raise ValueError(f"lengths must be 0 where index is the pool's idle slot, {slot}, for row {row}")
            if 0 <= slot < self.idle and slot not in self._used:
                raise ValueError(f"index must name slots in use, got {slot} for row {row}: slot {slot} is not in use")

    @torch.no_grad()
    def _fill(self, state: Tensor, tokens: Tensor, count: int) -> list[int]:
        """`count` slots, with this in them."""
        if count > len(self._free):
            raise RuntimeError(f"the pool has {len(self._free)} free slots of {self.idle}, and {count} are needed")
        slots = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(slots)
        index = torch.tensor(slots, dtype=torch.int64, device=self.states.device)
        written(self.states, state.expand(count, *self.states.shape[1:]), index)
        written(self.tokens, tokens.to(self.tokens).expand(count), index)
        return slots

    def _held(self, slot: int) -> int:
        slot = check_count("slot", slot, 0)
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use")
        return slot


__all__ = ["StatePool"]
