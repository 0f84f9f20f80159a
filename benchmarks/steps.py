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
from leetdist.kernels.constant_decay.cuda import hopper as constant
from leetdist.kernels.token_decay.cuda import by_head, gradients
from leetdist.kernels.token_decay.cuda import hopper as token
from leetdist.kernels.token_decay.cuda.gradients import SIZE

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass
class Shape:
    """heads: of v and of the states; shared: of q and k."""

    heads: int
    shared: int
    rows: int
    columns: int
    tokens: int
    tile: int

    def draw(self, heads: int, dim: int) -> Tensor:
        return torch.randn(1, heads, self.tokens, dim, device="cuda", dtype=BF16)


def steps(shape: Shape, kernels: Any, log_decay: Tensor) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, call, bytes) of the kernels of a forward and a backward pass, but for the folds."""
    q, k = (shape.draw(shape.shared, shape.rows) for _ in range(2))
    v, do = (shape.draw(shape.heads, shape.columns) for _ in range(2))
    tiles = Tiles(shape.tile, (0, shape.tokens))
    states = torch.randn(1, shape.heads, tiles.count, shape.rows, shape.columns, device="cuda")
    added = torch.empty_like(states)

    def states_of(name: str, b: Tensor, c: Tensor, reverse: bool) -> tuple[str, Callable[[], object], int]:
        call = partial(kernels.tile_states, b, c, log_decay, tiles, reverse=reverse, out=added)
        return name, call, sum(x.nbytes for x in (b, c, added))

    def outputs(name: str, a: Tensor, b: Tensor, c: Tensor, states: Tensor, reverse: bool) -> Any:
        options: dict[str, Any] = {"reverse": reverse, "scale": 0.1, "state_scale": 0.1}
        given = a, b, c, states, log_decay, tiles
        out = torch.empty(1, c.shape[1], shape.tokens, c.shape[3], device="cuda", dtype=BF16)
        moved = sum(x.nbytes for x in (a, b, c, states, out))
        if c.shape[1] == shape.heads:
            return name, partial(kernels.tile_outputs, *given, **options, out_dtype=BF16, out=out), moved

        def added_up() -> Tensor:
            return sum_shared(kernels.tile_outputs(*given, **options, out_dtype=FP32), c.shape[1], BF16)

        return name, added_up, moved

    yield states_of("states", k, v, False)
    yield outputs("o", q, k, v, states, False)
    yield states_of("gradients of states", q, do, True)
    yield outputs("dq", do, v, k, states.mT, False)
    yield outputs("dk", v, do, q, states.mT, True)
    yield outputs("dv", k, q, do, states, True)
    if (shape.shared, shape.rows, shape.columns) != (shape.heads, SIZE, SIZE):
        return
    passes = by_head if log_decay.ndim == 1 else gradients
    given = q, k, v, do, states
    _, kept = passes.early_gradients(*given, log_decay, tiles, scale=0.1)
    early = partial(passes.early_gradients, *given, log_decay, tiles, scale=0.1)
    yield "dq, where log_decay is learnt", early, 5 * q.nbytes + states.nbytes
    late = partial(passes.late_gradients, *given, states, log_decay, tiles, kept, scale=0.1)
    yield "dk, dv and d log_decay", late, 6 * q.nbytes + 2 * states.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--tile", type=int, default=4096)
    parser.add_argument("--milliseconds", type=int, default=100, help="how long each kernel is repeated")
    options = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "leetdist": leetdist.__version__, **vars(options)}))
    for heads, shared, rows, columns in ((32, 32, 128, 128), (64, 8, 128, 64), (32, 32, 64, 64)):
        shape = Shape(heads, shared, rows, columns, options.tokens, options.tile)
        none, weak = torch.zeros(heads, device="cuda"), -0.01 * torch.rand(1, heads, options.tokens, device="cuda")
        for kind, kernels, log_decay in (("constant", constant, none), ("token", token, weak)):
            for step, call, moved in steps(shape, kernels, log_decay):
                took = do_bench(call, warmup=options.milliseconds // 2, rep=options.milliseconds, return_mode="median")
                line = {"shape": f"{heads} in {shared} x {rows} x {columns}", "decay": kind, "step": step}
                print(json.dumps(line | {"ms": round(took, 3), "TB/s": round(moved / took / 1e9, 2)}), flush=True)


if __name__ == "__main__":
    main()
