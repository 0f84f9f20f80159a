#!/usr/bin/env bash
# One would guess: a conv1d of a DTensor that is sharded along the sequence gets its neighbours' tokens, or the whole
# sequence, as a cumsum does, or is refused.
# It is so that: each rank convolves its own shard, as if zeros were around it, and the result says that it is the whole
# and replicated. Its shape is the whole's; what is on the ranks is shorter, and another thing on each, a mean of it too.
# Nothing is said before the backward pass, which finds shapes that do not match. Gather the sequence first
# (`x.redistribute(placements=[Replicate()])`), or fetch the tokens before a shard by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/conv.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

RANKS = 2


def look(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 6, 16, generator=random), torch.randn(6, 1, 4, generator=random)
    want = F.conv1d(x, weight, padding=3, groups=6)
    kernel, mean = distribute_tensor(weight, mesh, [Replicate()]), float(want.square().mean())
    seen = {}
    for name, dim, ready in (
        ("sharded along the batch", 0, lambda t: t),
        ("sharded along the sequence", 2, lambda t: t),
        ("gathered from there", 2, lambda t: t.redistribute(placements=[Replicate()])),
    ):
        found = F.conv1d(ready(distribute_tensor(x, mesh, [Shard(dim)])), kernel, padding=3, groups=6)
        whole = found.full_tensor()
        right = whole.shape == want.shape and torch.allclose(whole, want, atol=1e-5)
        told = found.shape == want.shape and (name.endswith("batch") or found.placements == (Replicate(),))
        size, means = tuple(found.to_local().shape), [None] * RANKS
        dist.all_gather_object(means, round(float(found.square().mean().full_tensor()), 4))
        seen[name] = right, told, means
        if rank == 0:
            print(f"{name}: {tuple(found.shape)}, {found.placements}, on a rank {size}; mean square {means}, {mean:.4f} of the whole")
    if rank == 0:
        print(f"torch {torch.__version__}, {RANKS} ranks, x of {tuple(x.shape)}, conv1d of {tuple(want.shape)}")
    wrong, told, means = seen.pop("sharded along the sequence")
    holds = not wrong and told and len(set(means)) == RANKS and all(right and told for right, told, _ in seen.values())
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not holds)


if __name__ == "__main__":
    try:
        torch.multiprocessing.spawn(look, (sys.argv[1],), RANKS)
    except torch.multiprocessing.ProcessExitedException:
        sys.exit(1)
PY
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore "$folder/conv.py" "$folder"
