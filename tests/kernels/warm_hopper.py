"""python tests/kernels/warm_hopper.py: compile the CUDA C++ kernels for Hopper into LEETDIST_CACHE, on all cores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from leetdist.kernels.constant_decay.cuda import launches
from leetdist.kernels.runtime import nvrtc
from leetdist.kernels.token_decay.cuda import shared

DTYPES = (torch.bfloat16, torch.float16)


Job = tuple[str, tuple[tuple[str, int], ...]]  # a source, and what it is compiled with


def compiled(job: Job) -> int:
    source, made = job
    return len(nvrtc.cubin(source, "sm_90a", made))


def of_shared_heads() -> Iterator[Job]:
    """Those of kernels/token_decay/cuda/shared.py and shared_gradients.py."""
    for rows, reverse, dtype in itertools.product((64, 128), (False, True), DTYPES):
        for source, groups, names in (
            ("shared_states", 4, ("tile_states",)),
            ("paired_outputs", 1, launches.OUTPUTS),
        ):
            for name in names:
                made = launches.defines(name, rows, 64, groups, dtype, False, reverse, True)
                yield f"token_decay/cuda/{source}.cu", made
    for size, reverse, name in itertools.product((64, 128), (False, True), launches.OUTPUTS):
        made = launches.defines(name, 64, size, 1, torch.bfloat16, True, reverse, True)
        yield "token_decay/cuda/summed_outputs.cu", made
        if reverse or (size == 64 and name != launches.AGAIN):
            made = launches.defines(name, size, 64, 2, torch.bfloat16, False, reverse, True)
            yield "token_decay/cuda/paired_gradients.cu", made
    for wide, reverse, name, cluster in itertools.product((False, True), (False, True), launches.OUTPUTS, (1, 2)):
        made = launches.defines(name, 64, 64, 2, torch.bfloat16, wide, reverse, True)
        made = *made, ("CLUSTER", cluster)
        yield "token_decay/cuda/grouped_outputs.cu", made
        if not reverse and name != launches.AGAIN:
            yield "token_decay/cuda/grouped_outputs.cu", made + shared.FLOWS


if __name__ == "__main__":
    held = [(rows, columns, 1) for rows in (128, 64) for columns in (128, 64)] + [(256, 64, 1), (256, 64, 2)]
    shapes = list(itertools.product(held, DTYPES, (False, True), (False, True), (False, True)))
    kinds = [(name, *shape) for name in launches.OUTPUTS for shape in shapes]
    kinds += [("tile_states", *shape) for shape in shapes if not shape[2]]
    jobs = [
        (f"constant_decay/cuda/{name.split()[0]}.cu", launches.defines(name, *held, *more))
        for name, held, *more in kinds
    ]
    with ProcessPoolExecutor() as pool:
        sizes = list(pool.map(compiled, [*jobs, *of_shared_heads()]))
    print(f"{len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB in {nvrtc.cache_folder()}")
