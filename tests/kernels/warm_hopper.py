"""python tests/kernels/warm_hopper.py: compile the CUDA C++ kernels for Hopper into LEETDIST_CACHE, on all cores."""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor

import torch

from leetdist.kernels.common import loader
from leetdist.kernels.constant_decay.cuda import hopper
from leetdist.kernels.token_decay.cuda import shared

DTYPES = (torch.bfloat16, torch.float16)


def compiled(name: str, held: tuple[int, int, int], dtype: torch.dtype, wide: bool, reverse: bool, token: bool) -> int:
    made = hopper.defines(name, *held, dtype, wide, reverse, token)
    source = f"constant_decay/cuda/{name.split()[0]}.cu"
    if token and wide and held[0] == shared.WIDTH and dtype == torch.bfloat16:
        loader.cubin("token_decay/cuda/summed_outputs.cu", "sm_90a", made)
    if token and not wide and held[0] <= 128 and held[1] == shared.WIDTH:
        paired = "paired_states" if name == "tile_states" else "paired_outputs"
        loader.cubin(f"token_decay/cuda/{paired}.cu", "sm_90a", made)
    return len(loader.cubin(source, "sm_90a", made))


if __name__ == "__main__":
    held = [(rows, columns, 1) for rows in (128, 64) for columns in (128, 64)] + [(256, 64, 1), (256, 64, 2)]
    shapes = list(itertools.product(held, DTYPES, (False, True), (False, True), (False, True)))
    jobs = [(name, *shape) for name in hopper.OUTPUTS for shape in shapes]
    jobs += [("tile_states", *shape) for shape in shapes if not shape[2]]
    with ProcessPoolExecutor() as pool:
        sizes = list(pool.map(compiled, *zip(*jobs, strict=True)))
    print(f"{len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB in {loader.cache_folder()}")
