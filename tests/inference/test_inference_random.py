"""Random schedules of decoding, of views and dtypes of all kinds, against one fp64 recurrence a request."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import leetdist
from leetdist.reference import recurrence, relative_error

H, DK, DV, SLOTS = 4, 8, 12, 7
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass
class Request:
    """What a request has seen, and the slot that it is in."""

    slot: int
    seen: list[Tensor]

    def check(self, token: list[Tensor], o: Tensor, log_decay: Tensor, scale: float) -> None:
        """o of the tokens, as of a sequence that ends with them."""
        whole = [torch.cat((x, more), 2) for x, more in zip(self.seen, token, strict=True)]
        expected, _ = recurrence(*whole, log_decay, scale=scale)
        count = token[0].shape[2]
        assert relative_error(o, expected[:, :, -count:]) < ROUNDING[o.dtype]


def view(x: Tensor) -> Tensor:
    """x as one of the views that have its values."""
    kind = random.randrange(3)
    if kind == 0:
        return x
    if kind == 1:  # every second of some, beside values that must not be read
        return torch.stack((x, x + 77), -1)[..., 0]
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def whole_numbers(values: list[int]) -> Tensor:
    x = torch.tensor(values, dtype=random.choice((torch.int32, torch.int64)))
    return x[:1].expand(len(values)) if len(set(values)) == 1 and random.random() < 0.5 else view(x)


@pytest.mark.parametrize("case", range(16))
def test_any_schedule_is_one_recurrence(case: int) -> None:
    dtype, kv_heads = random.choice(list(ROUNDING)), random.choice((1, 2, 4))
    scale = random.choice((1.0, 0.3))
    log_decay = view(torch.tensor([random.choice((0.0, -1e-4, -0.3, -2.0, -40.0, -math.inf)) for _ in range(H)]))
    if dtype == torch.float64 and random.random() < 0.5:
        log_decay = log_decay.double()

    def tokens(rows: int, count: int) -> list[Tensor]:
        shapes = ((H, DK), (kv_heads, DK), (kv_heads, DV))
        return [view(torch.randn(rows, heads, count, dim).to(dtype)) for heads, dim in shapes]

    def mode() -> contextlib.AbstractContextManager[None]:
        return torch.inference_mode(random.random() < 0.5)  # type: ignore[return-value]

    pool, requests = None, []
    for _ in range(3):
        with mode():
            stream = leetdist.stream(log_decay, scale=scale, tile=16)
            request = Request(-1, [x[:, :, :0] for x in tokens(1, 1)])
            for _ in range(random.randint(1, 3)):
                piece = tokens(1, random.randint(1, 20))
                request.check(piece, stream.push(*piece), log_decay, scale)
                request.seen = [torch.cat(pair, 2) for pair in zip(request.seen, piece, strict=True)]
            pool = pool or leetdist.StatePool(SLOTS, like=stream.state)
            (request.slot,) = pool.put(stream.state)
        requests.append(request)
    for _ in range(14):
        act = random.random()
        with mode():
            if act < 0.15 and len(requests) < SLOTS:
                parent = random.choice(requests)
                requests += [Request(slot, list(parent.seen)) for slot in pool.fork(parent.slot, 1)]
            elif act < 0.25 and len(requests) > 1:
                pool.release([requests.pop(random.randrange(len(requests))).slot])
            else:
                chosen = random.sample(requests, random.randint(1, len(requests)))
                count, pads = random.randint(1, 8), random.randint(0, 2)
                step = tokens(len(chosen) + pads, count)
                kept = [random.randint(0, count) for _ in chosen] + [0] * pads
                index = whole_numbers([request.slot for request in chosen] + [pool.idle] * pads)
                everything = not pads and random.random() < 0.5
                lengths = None if everything else whole_numbers(kept)
                o = pool.steps(*step, index, lengths)
                for row, request in enumerate(chosen):
                    mine = [x[row : row + 1] for x in step]
                    request.check(mine, o[row : row + 1], log_decay, scale)
                    end = count if everything else kept[row]
                    request.seen = [
                        torch.cat((x, more[:, :, :end]), 2) for x, more in zip(request.seen, mine, strict=True)
                    ]
    assert pool is not None
    for request in requests:
        taken = pool.take(request.slot)
        assert taken.tokens == request.seen[0].shape[2]
        _, last = recurrence(*request.seen, log_decay, scale=scale)
        # Prompts in bf16 and fp16 add up rounded products; states of decoding alone are fp32.
        assert relative_error(taken.now, last) < ROUNDING[dtype]
    assert not pool.states[pool.idle].any()
