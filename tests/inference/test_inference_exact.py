"""Exact pools: whatever the schedule of prefill, steps, drafts, forks and moves, the bits of one call."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.operators.opened import Opened

H, SLOTS = 4, 7
LOG_DECAY = torch.tensor([0.0, -1e-3, -0.1, -3.0])
STEPS = torch.tensor([-1e-3, -0.2, 0.0, -1e-2, -50.0, -math.inf])


@dataclass(frozen=True)
class Kind:
    """An operator and its inputs. heads: of q, k and v."""

    tile: int
    dtype: torch.dtype = torch.float32
    by_token: bool = False
    heads: tuple[int, int, int] = (H, H, H)
    dk: int = 16
    dv: int = 24
    device: str = "cpu"
    scale: float = 0.3

    def tokens(self, count: int, rows: int = 1) -> list[Tensor]:
        """q, k, v and, of a decay a token, log_decay."""
        dims = (self.dk, self.dk, self.dv)
        made = [torch.randn(rows, h, count, d).to(self.dtype) for h, d in zip(self.heads, dims, strict=True)]
        if self.by_token:
            made.append(STEPS[torch.randint(len(STEPS), (rows, H, count))])
        return [x.to(self.device) for x in made]

    @property
    def decay(self) -> tuple[Tensor, ...]:
        return () if self.by_token else (LOG_DECAY.to(self.device),)

    def one_call(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        o, last = leetdist.linear_attention(
            *tensors, *self.decay, scale=self.scale, method="block", tile=self.tile, return_state=True
        )
        return o, last

    def stream(self, state: Any = None, group: Any = None) -> Any:
        if state is not None:
            return leetdist.stream(state=state, group=group)
        return leetdist.stream(*self.decay, scale=self.scale, tile=self.tile, group=group)

    def prefill(self, tensors: list[Tensor], ranks: int) -> tuple[Tensor, Any]:
        """In random pieces; the first of them over so many ranks. Outputs, and the state."""
        tokens = tensors[0].shape[2]
        shared = random.randint(0, tokens) if ranks > 1 else 0
        outputs, state = [], None
        if shared:

            def on_a_rank(group: Any) -> tuple[Tensor, Any]:
                stream = self.stream(group=group)
                o = stream.push(*(leetdist.shard_sequence(x[:, :, :shared], 2, group, tile=self.tile) for x in tensors))
                return o, stream.state

            results = leetdist.virtual_ranks(on_a_rank, ranks)
            outputs, state = [o for o, _ in results], results[-1][1]
        stream = self.stream(state)
        while shared < tokens:
            end = min(tokens, shared + random.randint(1, 2 * self.tile))
            outputs.append(stream.push(*(x[:, :, shared:end] for x in tensors)))
            shared = end
        return torch.cat(outputs, 2), stream.state


@dataclass
class Request:
    """A sequence, of which `age` tokens were kept; `whole` has the outputs of all of them, and `slot` the state."""

    tensors: list[Tensor]
    whole: Tensor
    slot: int
    age: int = field(default=0)

    def other_future(self, kind: Kind, room: int) -> Request:
        """The same past, and other tokens from here on."""
        tensors = [torch.cat((x[:, :, : self.age], y), 2) for x, y in zip(self.tensors, kind.tokens(room), strict=True)]
        return Request(tensors, kind.one_call(tensors)[0], self.slot, self.age)


def run_schedule(kind: Kind, acts: int, room: int, folder: Path | None = None, ranks: int = 1) -> None:
    """Random acts on a pool; every output is compared with that of one call over the request's tokens."""
    pool, requests = None, []
    for _ in range(3):
        tensors = kind.tokens(room)
        whole, _ = kind.one_call(tensors)
        age = random.randint(1, room // 2)
        o, state = kind.prefill([x[:, :, :age] for x in tensors], ranks)
        assert torch.equal(o, whole[:, :, :age])
        pool = pool or leetdist.StatePool(SLOTS, like=state, exact=True)
        (slot,) = pool.put(state)
        requests.append(Request(tensors, whole, slot, age))
    assert pool is not None
    for _ in range(acts):
        act = random.random()
        if act < 0.08 and len(requests) < SLOTS:
            parent = random.choice(requests)
            child = parent.other_future(kind, room - parent.age)
            (child.slot,) = pool.fork(parent.slot, 1)
            requests.append(child)
        elif act < 0.16:  # moved to another slot, through a file where there is one
            request = random.choice(requests)
            state = pool.take(request.slot)
            if folder is not None:
                leetdist.save_states(folder / "state", {"it": state}, model="m")
                state = leetdist.load_states(folder / "state", model="m", like={"it": state}, device=kind.device)["it"]
            pool.release([request.slot])
            (request.slot,) = pool.put(state)
        elif act < 0.24:  # on as a stream, and back
            request = random.choice(requests)
            end = min(room, request.age + random.randint(1, 40))
            if end > request.age:
                stream = kind.stream(pool.take(request.slot))
                o = stream.push(*(x[:, :, request.age : end] for x in request.tensors))
                assert torch.equal(o, request.whole[:, :, request.age : end])
                pool.release([request.slot])
                (request.slot,), request.age = pool.put(stream.state), end
        else:
            count = random.randint(1, 8)
            chosen = [r for r in random.sample(requests, random.randint(1, len(requests))) if r.age + count <= room]
            if not chosen:
                continue
            pads = random.randint(0, 2)
            kept = [random.choice((0, count, random.randint(0, count))) for _ in chosen]
            at = [[x[:, :, r.age : r.age + count] for x in r.tensors] for r in chosen]
            at += [kind.tokens(count) for _ in range(pads)]
            q, k, v, *own = (torch.cat(rows) for rows in zip(*at, strict=True))
            index = torch.tensor([r.slot for r in chosen] + [pool.idle] * pads, device=kind.device)
            lengths = torch.tensor(kept + [0] * pads, dtype=torch.int32, device=kind.device)
            everything = not pads and all(x == count for x in kept)
            o = pool.steps(q, k, v, index, None if everything else lengths, log_decay=own[0] if own else None)
            for row, request in enumerate(chosen):
                expected = request.whole[:, :, request.age : request.age + count]
                assert torch.equal(o[row : row + 1], expected), (kind, request.age, count)
                request.age += kept[row]
    for request in requests:
        state = pool.take(request.slot)
        _, last = kind.one_call([x[:, :, : request.age] for x in request.tensors])
        assert state.tokens == request.age == pool.tokens[request.slot]
        if kind.device == "cpu":
            assert torch.equal(state.now, last)
        else:  # kernels for GPUs leave out what is forgotten (State.now)
            torch.testing.assert_close(state.now, last, rtol=1e-4, atol=1e-4)
    assert not pool.tokens[pool.idle]


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("case", range(8))
def test_any_schedule_has_the_bits_of_one_call(case: int, tmp_path: Path) -> None:
    kind = Kind(
        tile=random.choice((16, 64, 128, 256, 512)),
        dtype=DTYPES[case % 4],
        by_token=case % 2 == 1,
        heads=random.choice(((H, H, H), (H, 2, 2), (1, 2, H), (H, 1, 1))),
        dk=random.choice((16, 17)),
    )
    run_schedule(kind, 40, 600, tmp_path, ranks=case % 4 + 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("by_token", [False, True])
def test_any_schedule_has_the_bits_of_one_call_in_triton(monkeypatch: pytest.MonkeyPatch, by_token: bool) -> None:
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    run_schedule(Kind(tile=128, by_token=by_token, heads=(H, 2, 2)), 6, 160)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dk", "dv", "tile", "dtype", "hopper", "by_token"),
    [
        (128, 128, 256, BF16, "1", False),
        (128, 64, 256, BF16, "1", True),
        (64, 128, 128, FP16, "1", False),
        (128, 128, 256, FP32, "1", True),
        (128, 128, 16, BF16, "1", False),
        (128, 128, 256, BF16, "0", True),
        (80, 48, 128, FP32, "0", False),
        (80, 48, 128, BF16, "1", False),
        (96, 128, 256, FP16, "1", True),
    ],
)
def test_any_schedule_has_the_bits_of_one_call_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dk: int, dv: int, tile: int, dtype: torch.dtype, hopper: str, by_token: bool
) -> None:
    monkeypatch.setenv("LEETDIST_HOPPER", hopper)
    heads = random.choice(((H, H, H), (H, 2, 2), (1, 2, H)))
    run_schedule(Kind(tile, dtype, by_token, heads, dk, dv, device="cuda"), 30, 600)


def test_another_order_of_the_same_sums_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a chunk that is closed in two halves rounds once more."""
    whole = Opened.advance

    def in_halves(
        self: Opened, k: Tensor, v: Tensor, decay: Tensor, at: Any, walked: Tensor, own: Tensor, total: Any
    ) -> None:
        half = k.shape[2] // 2
        for some in (slice(half), slice(half, None)):
            whole(self, k[:, :, some], v[:, :, some], decay, at, walked, own, total)

    kind = Kind(tile=256)
    tensors = kind.tokens(400)
    o, _ = kind.one_call(tensors)

    def decoded() -> Tensor:
        first, state = kind.prefill([x[:, :, :5] for x in tensors], 1)
        pool = leetdist.StatePool(1, like=state, exact=True)
        slot = torch.tensor(pool.put(state))
        parts = zip(*(x[:, :, 5:].split(7, 2) for x in tensors), strict=True)
        return torch.cat([first, *(pool.steps(*part, slot) for part in parts)], 2)

    assert torch.equal(decoded(), o)
    monkeypatch.setattr(Opened, "advance", in_halves)
    assert not torch.equal(decoded(), o)
    torch.testing.assert_close(decoded(), o, rtol=1e-4, atol=1e-4)


def _decode_after_a_shared_prompt(rank: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    found = []
    for by_token in (False, True):
        kind = Kind(tile=64, by_token=by_token)
        tensors = kind.tokens(260)
        stream = kind.stream(group=torch.distributed.group.WORLD)
        prompt = [leetdist.shard_sequence(x[:, :, :200], 2, torch.distributed.group.WORLD, tile=64) for x in tensors]
        stream.push(*prompt)
        pool = leetdist.StatePool(1, like=stream.state, exact=True)
        slot = torch.tensor(pool.put(stream.state))
        outputs = []
        for t in range(200, 260, 6):
            q, k, v, *own = (x[:, :, t : t + 6] for x in tensors)
            outputs.append(pool.steps(q, k, v, slot, log_decay=own[0] if own else None))
        found.append((torch.cat(outputs, 2), kind.one_call(tensors)[0][:, :, 200:]))
    return found


def test_every_rank_decodes_on_from_a_shared_prompt() -> None:
    for found in values(run_ranks(_decode_after_a_shared_prompt, 2)):
        for o, expected in found:
            assert torch.equal(o, expected)


@pytest.mark.parametrize("by_token", [False, True])
def test_what_is_not_finite_is_lost_as_in_one_call(by_token: bool) -> None:
    """A NaN in a key or an infinity in a value: the outputs behind it, until its tile ends, and no other."""
    kind = Kind(tile=256, by_token=by_token)
    tensors = kind.tokens(700)
    tensors[1][0, 1, 130, 3] = math.nan
    tensors[2][0, 2, 300, 5] = math.inf
    o, _ = kind.one_call(tensors)
    assert o.isnan().any()
    first, state = kind.prefill([x[:, :, :3] for x in tensors], 1)
    pool = leetdist.StatePool(1, like=state, exact=True)
    slot = torch.tensor(pool.put(state))
    outputs = [first]
    for t in range(3, 700, 8):
        q, k, v, *own = (x[:, :, t : t + 8] for x in tensors)
        outputs.append(pool.steps(q, k, v, slot, log_decay=own[0] if own else None))
    decoded = torch.cat(outputs, 2)
    streamed, _ = kind.prefill(tensors, 1)
    for ours in (decoded, streamed):
        assert torch.equal(ours.isnan(), o.isnan())
        assert torch.equal(ours.nan_to_num(7.0), o.nan_to_num(7.0))


def test_what_an_exact_pool_refuses() -> None:
    kind = Kind(tile=64)
    _, state = kind.prefill(kind.tokens(70), 1)
    pool = leetdist.StatePool(2, like=state, exact=True)
    slot = torch.tensor(pool.put(state))
    with pytest.raises(ValueError, match="at most T = 8 tokens for an exact pool, got 9"):
        pool.steps(*kind.tokens(9), slot)
    with pytest.raises(ValueError, match=r"k must have 4 heads of torch.float32, as the pool's states, got 2 of"):
        pool.steps(*Kind(tile=64, heads=(H, 2, H)).tokens(1), slot)
    with pytest.raises(ValueError, match="the state was made with tile 32, wanted 64"):
        pool.put(Kind(tile=32).prefill(kind.tokens(3), 1)[1])
    with pytest.raises(ValueError, match=r"its tile grid begins at token 70 and not at the first: it was decoded wi"):
        pool.put(state.after(state.now, 0))
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 in an exact pool, got torch.bfloat16"):
        leetdist.StatePool(2, like=state, exact=True, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="exact must be True or False, got 1"):
        leetdist.StatePool(2, like=state, exact=1)  # type: ignore[arg-type]
    other = leetdist.stream(LOG_DECAY, tile=64, method="lightning")
    other.push(*kind.tokens(3))
    with pytest.raises(ValueError, match="exact=True is for method \"block\", got a state of method 'lightning'"):
        leetdist.StatePool(2, like=other.state, exact=True)


def test_memory_of_a_slot_is_what_the_docs_say() -> None:
    kind = Kind(tile=512, dtype=torch.bfloat16, dk=128, dv=128)
    _, state = kind.prefill(kind.tokens(3), 1)
    pool, chunk = leetdist.StatePool(2, like=state, exact=True), state.opened.chunk
    assert pool.open is not None
    assert pool.open.bytes_a_slot == H * (3 * 64 + chunk // 2) * 1024 + 8
    small = Kind(tile=chunk, dtype=torch.bfloat16, dk=128, dv=128)
    _, state = small.prefill(small.tokens(3), 1)
    pool = leetdist.StatePool(2, like=state, exact=True)
    assert pool.open is not None
    assert pool.open.bytes_a_slot == H * (64 + chunk // 2) * 1024 + 8


@pytest.mark.parametrize(
    ("by_token", "tile", "backend"), [(False, 256, "inductor"), (True, 256, "aot_eager"), (True, 32, "aot_eager")]
)
def test_compiled_steps_are_one_graph_with_the_same_bits(by_token: bool, tile: int, backend: str) -> None:
    """Also where a row keeps some of its tokens, or none; chunks and tiles end on the way."""
    kind = Kind(tile, by_token=by_token, heads=(H, 2, 1))
    tensors = kind.tokens(300, rows=2)
    o, _ = kind.one_call(tensors)
    _, state = kind.prefill([x[:, :, :100] for x in tensors], 1)
    pool = leetdist.StatePool(3, like=state, exact=True)
    index = torch.tensor(pool.put(state))

    def steps(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, lengths: Tensor) -> Tensor:
        return leetdist.linear_attention_steps(q, k, v, pool, decay, index=index, lengths=lengths)

    compiled = torch.compile(steps, fullgraph=True, backend=backend)
    done = 100
    while done <= 296:
        q, k, v, *own = (x[:, :, done : done + 4] for x in tensors)
        decay, kept = own[0] if own else LOG_DECAY, random.choice((0, 1, 4, 4, 4))
        assert torch.equal(compiled(q, k, v, decay, torch.full((2,), kept)), o[:, :, done : done + 4])
        done += kept
    assert pool.tokens[index].tolist() == [done, done]


@pytest.mark.parametrize("by_token", [False, True])
def test_steps_on_states_and_pools_by_the_functions(by_token: bool) -> None:
    kind = Kind(tile=32, by_token=by_token, scale=0.5)
    tensors = kind.tokens(100, rows=2)
    o, last = kind.one_call(tensors)
    _, state = kind.prefill([x[:, :, :30] for x in tensors], 1)
    pool = leetdist.StatePool(3, like=state, exact=True)
    index = torch.tensor(pool.put(state))
    for t in range(30, 100):
        q, k, v, *own = (x[:, :, t : t + 1] for x in tensors)
        decay = own[0] if own else LOG_DECAY
        token, state = leetdist.linear_attention_step(q, k, v, state, decay, scale=0.5)
        assert torch.equal(token, o[:, :, t : t + 1])
        assert torch.equal(leetdist.linear_attention_steps(q, k, v, pool, decay, index=index), token)
    assert torch.equal(state.now, last)
    assert state.tokens == 100
    q, k, v, *own = (x[:, :, :1] for x in tensors)
    decay = own[0] if own else None
    with pytest.raises(ValueError, match=r"scale must be the state's own, 0.5, or not be given, got 0.3"):
        leetdist.linear_attention_step(q, k, v, state, decay, scale=0.3)
    with pytest.raises(ValueError, match="inplace must be False with a State"):
        leetdist.linear_attention_step(q, k, v, state, decay, inplace=True)
    with pytest.raises(ValueError, match=r"scale must be the pool's own, 0.5, or not be given, got 0.3"):
        leetdist.linear_attention_steps(q, k, v, pool, decay, scale=0.3, index=index)
    with pytest.raises(ValueError, match="index must be given with a StatePool"):
        leetdist.linear_attention_steps(q, k, v, pool, decay)
    with pytest.raises(ValueError, match="states must be a tensor or a StatePool, got list"):
        leetdist.linear_attention_steps(q, k, v, [], decay)  # type: ignore[arg-type]


def test_verify_decode_names_the_first_difference(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Equal as it is; and where sums are taken in another order, token, tile, chunk, row and head."""
    from leetdist.launch import verify
    from leetdist.testing.equality import Case

    monkeypatch.setattr(verify, "decoding_cases", lambda _: [Case(700, 16, 16, tile=256, decay="slow")])
    options = ["--decode", "--virtual", "2", "--device", "cpu"]
    assert verify.main(options) == 0
    assert "all 1 cases equal, bit for bit: prefill, decoding, drafts" in capsys.readouterr().out
    fold = Opened.fold
    monkeypatch.setattr(Opened, "fold", lambda self, start, own, *rest: fold(self, start, own * 1.001, *rest))
    assert verify.main(options) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS" in printed
    assert re.search(r"o differs first at token \d+ \(tile [12], chunk \d of it\), row 0, head \d: ", printed), printed
