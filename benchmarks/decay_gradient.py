"""python benchmarks/decay_gradient.py: what a decay a token takes on a GPU in the general kernels, step by step.

The two shapes of `run.py gated` at 131,072 tokens. `--gradient COLUMNS:WARPS:STAGES` also times the gradient of the
decays in that configuration, `--outputs` the outputs; what is wrong there (against what it is now) is said.
Hopper's own kernels: steps.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.cases import Case
from common.events import milliseconds
from common.measure import draw
from suites.gated import LONG, MAMBA
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.triton import block as outputs_of
from leetdist.kernels.constant_decay.triton.configs import Config
from leetdist.kernels.token_decay.triton import block, gradient
from leetdist.reference import relative_error
from leetdist.sequence.grid import default_tile


def row(name: str, call: Callable[[], object]) -> None:
    try:
        print(f"  {name:<56}{statistics.median(milliseconds(call, 10, warm=2)):8.3f} ms", flush=True)
    except Exception as error:  # another's kernels may not serve this machine
        print(f"  {name:<56}{type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)


def steps(case: Case, configurations: dict[str, list[Config]]) -> None:
    x = draw(case, "cuda", 0)
    q, k, v, do = (y.transpose(1, 2) for y in (x.q, x.k, x.v, x.do))
    g, tile, scale = x.log_decay, default_tile(case.tokens), case.scale
    tiles = Tiles(tile, (0, case.tokens))
    print(f"{case.name}, tiles of {tile} tokens")
    keep = block.transitions(g, tiles)
    states = block.tile_states(k, v, g, tiles, reverse=False)
    block.fold(states, None, keep, tiles, reverse=False)
    ends = block.tile_states(q, do, g, tiles, reverse=True, scale=scale)
    block.fold(ends, None, keep, tiles, reverse=True)
    row("transitions", lambda: block.transitions(g, tiles))
    row("token sums", lambda: block.token_sums(g, tiles))
    row("fold, and a copy of the states", lambda: block.fold(ends.clone(), None, keep, tiles, reverse=True))
    forward = {"reverse": False, "scale": scale, "state_scale": scale, "out_dtype": q.dtype}
    of_k = {"out_dtype": torch.float32 if k.shape[1] < v.shape[1] else k.dtype}
    backward = {"reverse": True, "scale": scale, "state_scale": 1.0}
    row("states", lambda: block.tile_states(k, v, g, tiles, reverse=False))
    row("o", lambda: block.tile_outputs(q, k, v, states, g, tiles, **forward))
    row("states of the backward pass", lambda: block.tile_states(q, do, g, tiles, reverse=True))
    row("dq", lambda: block.tile_outputs(do, v, k, states.mT, g, tiles, **forward))
    row("dk", lambda: block.tile_outputs(v, do, q, ends.mT, g, tiles, **backward, **of_k))
    row("dv", lambda: block.tile_outputs(k, q, do, ends, g, tiles, **backward, out_dtype=v.dtype))

    def decay_gradient() -> Tensor:
        return block.decay_gradient(q, k, v, do, states, ends, g, tiles, scale=scale)

    def outputs() -> Tensor:
        return block.tile_outputs(q, k, v, states, g, tiles, **forward)

    def in_configurations(
        name: str, call: Callable[[], Tensor], module: Any, setting: str, tried: list[Config]
    ) -> None:
        right, own = call(), getattr(module, setting)
        row(f"{name}, {own(case.dk, case.dv, q.dtype, tile)}", call)
        for config in tried:
            setattr(module, setting, lambda *_, config=config: config)
            try:
                error = relative_error(call(), right)
                row(f"{name}, {config}{f', WRONG by {error:.1e}' if error > 1e-2 else ''}", call)
            except Exception as error:
                print(f"  {name}, {config}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            finally:
                setattr(module, setting, own)

    in_configurations("d log_decay", decay_gradient, gradient, "gradient_config", configurations["gradient"])
    in_configurations("o", outputs, outputs_of, "block_config", configurations["outputs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gradient", "outputs"):
        parser.add_argument(f"--{name}", nargs="*", default=[], metavar="COLUMNS:WARPS:STAGES")
    configurations = {
        name: [Config(64, *map(int, one.split(":"))) for one in given]
        for name, given in vars(parser.parse_args()).items()
    }
    for case in (LONG, MAMBA):
        steps(case, configurations)


if __name__ == "__main__":
    main()
