"""python benchmarks/exact_decoding.py: a token of decoding with the bits of one call, on a GPU, from CUDA graphs.

Checks first: random schedules of a few tokens a call against one call, with torch.equal. Then microseconds a step, of
32 bf16 heads of 128: means over two tiles, so that the closing of chunks and tiles is in them, with requests of one age
and of many; drafts of four tokens, of which none is kept; and the step that has other bits. Beside them a copy's
bandwidth, and how long what a step must read and write takes at it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable

import torch
from common.measure import copy_bandwidth
from torch import Tensor

import leetdist
from leetdist.kernels.constant_decay.cuda import open_chunk

HEADS, DIM, TILE, CHUNK = 32, 128, 1024, 64
BF16 = torch.bfloat16


def draw(batch: int, tokens: int) -> list[Tensor]:
    return [torch.randn(batch, HEADS, tokens, DIM, device="cuda").to(BF16) for _ in range(3)]


def decays() -> Tensor:
    return -torch.exp2(-8 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)  # Lightning Attention's slopes


def pool_of(slots: int, tokens: int = 100) -> tuple[leetdist.StatePool, list[int], list[Tensor]]:
    """A pool whose slots are in use by copies of one prompt, and the prompt."""
    prompt = draw(1, tokens)
    stream = leetdist.stream(decays(), tile=TILE, method="block")
    stream.push(*prompt)
    pool = leetdist.StatePool(slots, like=stream.state, exact=True)
    (first,) = pool.put(stream.state)
    return pool, [first, *(pool.fork(first, slots - 1) if slots > 1 else [])], prompt


def check(tokens: int = 2 * TILE) -> bool:
    """Whether a few tokens a call give what one call gives."""
    pool, slots, prompt = pool_of(2)
    more = draw(2, tokens)
    both = [torch.cat((p.expand(2, -1, -1, -1), x), 2) for p, x in zip(prompt, more, strict=True)]
    expected = leetdist.linear_attention(*both, decays(), method="block", tile=TILE)[:, :, prompt[0].shape[2] :]
    index, done = torch.tensor(slots, device="cuda"), 0
    same = True
    while done < tokens:
        count = min(random.randint(1, 8), tokens - done)
        kept = random.choice((0, count, random.randint(0, count)))
        o = pool.steps(
            *(x[:, :, done : done + count] for x in more), index, torch.full((2,), kept, device="cuda")
        )  # fmt: skip
        same = same and torch.equal(o, expected[:, :, done : done + count])
        done += kept
    return same


def microseconds(step: Callable[[], object], steps: int, replays: int) -> float:
    """Of one step, in a graph of `steps`."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            step()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / steps / replays * 1e3


def measured(batch: int, bandwidth: float) -> dict[str, float]:
    pool, slots, _ = pool_of(batch)
    assert pool.open is not None
    assert pool.open.walked is not None
    assert pool.open.own is not None
    for x in (pool.open.start, pool.open.walked, pool.open.own, pool.open.k, pool.open.v):
        x.normal_()
    if pool.open.held is not None:
        pool.open.held.copy_(open_chunk.held(pool.open.walked, BF16))
    index, spread = torch.tensor(slots, device="cuda"), torch.arange(batch + 1, device="cuda") * 61
    one, four, none = draw(batch, 1), draw(batch, 4), torch.zeros(batch, dtype=torch.int64, device="cuda")
    ages, rows = pool.tokens, {"batch": float(batch)}
    for name, start in (("one age", 0 * spread), ("many ages", spread)):
        ages.copy_(start)
        rows[name] = microseconds(lambda: pool.steps(*one, index), CHUNK, 2 * TILE // CHUNK)
    drafts = []
    for place in range(0, CHUNK, 4):  # of the first request; the others' lie elsewhere
        ages.copy_((spread + place) % CHUNK)
        drafts.append(microseconds(lambda: pool.steps(*four, index, none), 8, 4))
    rows["4 drafts"] = sum(drafts) / len(drafts)
    states, log_decay = torch.zeros(batch, HEADS, DIM, DIM, device="cuda"), decays()
    rows["other bits"] = microseconds(lambda: leetdist.linear_attention_steps(*one, states, log_decay), CHUNK, 8)
    state, tokens = batch * HEADS * DIM * DIM * 4, batch * HEADS * CHUNK / 2 * 2 * DIM * 2
    read = state if pool.open.held is None else state / 2
    closing = 4 * state + (0 if pool.open.held is None else state / 2)
    rows["bytes at copy speed"] = (read + tokens + closing / CHUNK) / bandwidth * 1e6
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    options = parser.parse_args()
    bandwidth = copy_bandwidth("cuda")  # in a graph, copies reach 2.7 TB/s
    about = {"device": torch.cuda.get_device_name(), "leetdist": leetdist.__version__, "copy_TB_s": bandwidth / 1e12}
    print(json.dumps({**about, "same bits": check()}))
    for batch in options.batches:
        print(json.dumps({name: round(value, 1) for name, value in measured(batch, bandwidth).items()}), flush=True)


if __name__ == "__main__":
    main()
