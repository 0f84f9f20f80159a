"""python benchmarks/steps.py: the kernels of a call one by one on a Hopper GPU, with a constant decay and one a token.

A line a kernel: median milliseconds, and the bytes it must read and write over that time. An operand that several
heads share counts once, and so do gradients that are added up over them, with the sum. No token is so far from a state
that it is left out. The last two make all gradients together, where the decay is learnt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

import leetdist
from leetdist.kernels.common.sums import sum_shared
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import grouped as constant
from leetdist.kernels.token_decay.cuda import by_head, gradients, shared_gradients
from leetdist.kernels.token_decay.cuda import hopper as token
from leetdist.kernels.token_decay.cuda.gradients import SIZE
from leetdist.kernels.token_decay.triton.weighted import weighted_values

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass
class Shape:
    """heads: of q, k and v; the states have as many as the widest of them."""

    heads: tuple[int, int, int]
    rows: int
    columns: int
    tokens: int
    tile: int

    @property
    def widest(self) -> int:
        return max(self.heads)

    def draw(self, heads: int, dim: int) -> Tensor:
        return torch.randn(1, heads, self.tokens, dim, device="cuda", dtype=BF16)


def steps(
    shape: Shape, kernels: Any, log_decay: Tensor, weight: Tensor | None = None
) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, call, bytes) of the kernels of a forward and a backward pass, but for the folds. weight: what those that
    read v multiply it by."""
    of_q, of_k, of_v = shape.heads
    q, k = (shape.draw(own, shape.rows) for own in (of_q, of_k))
    v, do = (shape.draw(own, shape.columns) for own in (of_v, shape.widest))
    tiles = Tiles(shape.tile, (0, shape.tokens))
    states = torch.randn(1, shape.widest, tiles.count, shape.rows, shape.columns, device="cuda")
    added = torch.empty_like(states)
    weighted = {} if weight is None else {"weight": weight}

    def states_of(name: str, b: Tensor, c: Tensor, reverse: bool) -> tuple[str, Callable[[], object], int]:
        more = weighted if c is v else {}
        call = partial(kernels.tile_states, b, c, log_decay, tiles, reverse=reverse, out=added, **more)
        return name, call, sum(x.nbytes for x in (b, c, added))

    def outputs(name: str, wanted: int, a: Tensor, b: Tensor, c: Tensor, states: Tensor, reverse: bool) -> Any:
        options: dict[str, Any] = {"reverse": reverse, "scale": 0.1, "state_scale": 0.1}
        options |= weighted if any(x is v for x in (a, b, c)) else {}
        given = a, b, c, states, log_decay, tiles
        out = torch.empty(1, wanted, shape.tokens, c.shape[3], device="cuda", dtype=BF16)
        moved = sum(x.nbytes for x in (a, b, c, states, out))
        if wanted == shape.widest:
            return name, partial(kernels.tile_outputs, *given, **options, out_dtype=BF16, out=out), moved

        if kernels is constant:
            options["heads"] = wanted

        def added_up() -> Tensor:
            return sum_shared(kernels.tile_outputs(*given, **options, out_dtype=FP32), wanted, BF16)

        return name, added_up, moved

    yield states_of("states", k, v, False)
    yield outputs("o", shape.widest, q, k, v, states, False)
    yield states_of("gradients of states", q, do, True)
    yield outputs("dq", of_q, do, v, k, states.mT, False)
    yield outputs("dk", of_k, v, do, q, states.mT, True)
    yield outputs("dv", of_v, k, q, do, states, True)
    own, shared = (shape.rows, shape.columns) == (SIZE, SIZE), shape.columns == shared_gradients.WIDTH
    if len(set(shape.heads)) > 1 if own else not shared or log_decay.ndim == 1 or shape.widest // of_q % 4:
        return
    passes: Any = shared_gradients if shared else by_head if log_decay.ndim == 1 else gradients
    given = q, k, v, do, states
    _, kept = passes.early_gradients(*given, log_decay, tiles, scale=0.1, **weighted)
    early = partial(passes.early_gradients, *given, log_decay, tiles, scale=0.1, **weighted)
    read = sum(x.nbytes for x in given)
    yield "dq, where log_decay is learnt", early, read + q.nbytes
    late = partial(passes.late_gradients, *given, states, log_decay, tiles, kept, scale=0.1, **weighted)
    yield "dk, dv and d log_decay", late, read + states.nbytes + k.nbytes + v.nbytes
    if weight is not None:
        yield "v times its weights, written", partial(weighted_values, v, weight), 2 * v.nbytes + weight.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--tile", type=int, default=4096)
    parser.add_argument("--milliseconds", type=int, default=100, help="how long each kernel is repeated")
    options = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "leetdist": leetdist.__version__, **vars(options)}))
    plain, mamba, small = ((32, 32, 32), 128, 128), ((8, 8, 64), 128, 64), ((32, 32, 32), 64, 64)
    grouped = tuple(((32, own, own), 128, 128) for own in (8, 1))
    for heads, rows, columns in (plain, mamba, small, *grouped):
        shape = Shape(heads, rows, columns, options.tokens, options.tile)
        none = torch.zeros(shape.widest, device="cuda")
        weak = -0.01 * torch.rand(1, shape.widest, options.tokens, device="cuda")
        kinds = [("constant", constant, none, None), ("token", token, weak, None)]
        if heads == mamba[0]:
            kinds.append(("token, v weighted", token, weak, torch.rand_like(weak)))
        for kind, kernels, log_decay, weight in kinds:
            for step, call, moved in steps(shape, kernels, log_decay, weight):
                took = do_bench(call, warmup=options.milliseconds // 2, rep=options.milliseconds, return_mode="median")
                line = {"shape": f"{'/'.join(map(str, heads))} heads, {rows} x {columns}", "decay": kind, "step": step}
                print(json.dumps(line | {"ms": round(took, 3), "TB/s": round(moved / took / 1e9, 2)}), flush=True)


if __name__ == "__main__":
    main()
