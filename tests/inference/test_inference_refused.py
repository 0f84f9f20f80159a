"""What inference calls refuse: each is a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import leetdist

Row = tuple[str, Callable[[], Any], str]
H, D = 2, 16


def tokens(n: int, rows: int = 1) -> Tensor:
    return torch.ones(rows, H, n, D)


def pushed() -> Any:
    stream = leetdist.stream(-torch.ones(H), tile=16)
    stream.push(tokens(20), tokens(20), tokens(20))
    return stream


def steps(**changes: Any) -> Tensor:
    given = {name: tokens(2, 2) for name in "qkv"} | {"states": torch.zeros(2, H, D, D)}
    return leetdist.linear_attention_steps(**(given | changes))


def pooled(**changes: Any) -> Tensor:
    stream = leetdist.stream(-torch.ones(H), tile=16)
    stream.push(tokens(32), tokens(32), tokens(32))
    pool = leetdist.StatePool(2, like=stream.state)
    pool.put(stream.state)
    return pool.steps(tokens(1), tokens(1), tokens(1), **({"index": torch.tensor([0])} | changes))


def push_fakes() -> None:
    with FakeTensorMode():
        leetdist.stream(tile=16).push(tokens(3), tokens(3), tokens(3))


def rows() -> Iterator[Row]:
    pair = torch.tensor([0, 1])
    odd = [("sparse", pair.to_sparse()), ("nested", torch.nested.nested_tensor([pair])), ("list", [0, 1])]
    odd.append(("complex", torch.zeros(1, dtype=torch.complex64)))
    for what, x in odd:
        for name in ("index", "lengths"):
            yield f"steps {name} {what}", partial(steps, **{name: x}), f"{name} must be"
        if what != "list":
            yield f"pool index {what}", lambda x=x: pooled(index=x), "index must"
            yield f"pool lengths {what}", lambda x=x: pooled(lengths=x), "lengths must"
        yield f"rows {what}", lambda x=x: pushed().state.select(x), "rows must be"
    for strides in [(1, 256, 16, 1), (512, 16, 16, 1), (512, 256, 8, 1)]:
        states = torch.zeros(4096).as_strided((2, H, D, D), strides)
        yield f"steps states {strides}", partial(steps, states=states), "states .* overlap"
    for place, name in enumerate("qkv"):
        for value in (None, [1.0], "x", 1.0, tokens(3).to("meta") if place else None):
            piece = [tokens(3)] * place + [value] + [tokens(3)] * (2 - place)
            yield f"push {name} {type(value).__name__}", lambda p=piece: pushed().push(*p), rf"^{name} must be"
    yield "push log_decay", lambda: leetdist.stream().push(*[tokens(3)] * 3, 1.0), "log_decay must be"
    yield "map pairs", lambda: list(pushed().map([(tokens(3), tokens(3))])), "a piece must be q, k, v"
    for pieces in (None, 3, "pieces", b"x", tokens(3), torch.tensor(1.0), 1.5, object()):
        yield f"map {type(pieces).__name__}", lambda p=pieces: list(pushed().map(p)), "^pieces must be an iterable of"
        yield f"map {type(pieces).__name__} at once", lambda p=pieces: pushed().map(p, window=8), "^pieces must be"
    yield "map window at once", lambda: pushed().map([], window=0), "window must be"
    for piece in (None, 3, 0, 1.5, "x", {}, object(), [], tokens(3), torch.stack([tokens(3)] * 3), range(3)):
        for window in (None, 8):
            given = [[tokens(3)] * 3, piece]
            what = f"map of {type(piece).__name__}, window {window}"
            yield what, lambda g=given, w=window: list(pushed().map(g, window=w)), "^a piece must be q, k, v"
            yield f"{what}, the first", lambda g=given, w=window: list(pushed().map(g[1:], window=w)), "^a piece must"
    for method in (None, 3, ["block"], torch.ones(2), b"block"):
        yield f"stream method {method!r}", lambda m=method: leetdist.stream(method=m), "method must be"
    for state in (range(3), 3, None, [1.0], object(), leetdist.stream()):
        one = [tokens(1)] * 3
        what = f"step on {type(state).__name__}"
        yield what, lambda s=state, o=one: leetdist.linear_attention_step(*o, s), "state must be a tensor"
    for name, count in (("tokens", 1 << 70), ("tokens", 1.5), ("tokens", None), ("tokens", -40)):
        state = pushed().state
        yield f"after {count}", lambda s=state, c=count: s.after(s.boundary, c), f"{name} must be"
    yield "after None", lambda: pushed().state.after(None, 1), "state must be"
    for count in (1 << 70, 10**30):
        yield f"{count} slots", lambda c=count: leetdist.StatePool(c, like=pushed().state), "slots must be"
        yield f"{count} copies", lambda c=count: pushed().state.fork(c), "copies must be"
        yield f"device {count}", lambda c=count: pushed().state.to(c), "device must be"
    few = replace(pushed().state, k=tokens(4), v=tokens(4))
    for shape in ((0,), (1,), (H + 1,)):
        yield f"State of {shape}", lambda x=shape: replace(few, log_decay=-torch.ones(x)), "log_decay must have shape"
    empty = tokens(3).to("meta")
    yield "push on meta", lambda: leetdist.stream(tile=16).push(empty, empty, empty), "q must have values"
    yield "push fakes", push_fakes, "q must have values"
    yield "stream scale", lambda: leetdist.stream(scale=10**400), "scale must be a finite number"
    yield "stream log_decay", lambda: leetdist.stream(-torch.ones(H, device="meta")), "log_decay must have values"
    for device in ("tpu", 3, [1]):
        yield f"state to {device!r}", lambda d=device: pushed().state.to(d), "device must be"
    for path in (3, None, b"x", ["a"], ""):
        yield f"save {path!r}", lambda p=path: leetdist.save_states(p, {"a": pushed().state}), "path must be"
        yield f"load {path!r}", lambda p=path: leetdist.load_states(p), "path must be"
    for path in ("/", "/no such folder/file"):
        yield f"save to {path}", lambda p=path: leetdist.save_states(p, {"a": pushed().state}), "path must be"
        yield f"load of {path}", lambda p=path: leetdist.load_states(p), "path must be"
    meta = torch.zeros(1, dtype=torch.int64, device="meta")
    yield "select meta", lambda: pushed().state.select(meta), "rows must be"
    yield "release 0-d", lambda: leetdist.StatePool(1, like=pushed().state).release(torch.tensor(0)), "slots must be"


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row[0])
def test_is_refused_in_words(row: Row) -> None:
    with pytest.raises(ValueError, match=row[2]):
        row[1]()


def test_states_of_any_layout_without_overlap_are_served() -> None:
    for states in (torch.zeros(2, H, D, D).mT, torch.zeros(4, H, D, D)[::2], torch.zeros(H, 2, D, D).transpose(0, 1)):
        plain = states.clone(memory_format=torch.contiguous_format)
        assert torch.equal(steps(states=states), steps(states=plain))
        assert torch.equal(states, plain)


def test_ranks_do_not_wait_for_one_whose_piece_is_none() -> None:
    def rank(group: Any) -> None:
        piece: list[Any] = [tokens(16)] * 3 if group.rank else [tokens(16), None, tokens(16)]
        leetdist.stream(tile=16, group=group).push(*piece)

    with pytest.raises(ValueError, match="k must be a tensor"):
        leetdist.virtual_ranks(rank, 2)
