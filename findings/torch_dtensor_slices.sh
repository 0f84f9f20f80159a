#!/usr/bin/env bash
# One would guess: what is written in place into a slice of a DTensor (`x[:, 0] = y`, `x[:, :3].mul_(2)`) is in the
# DTensor afterwards, as with any tensor, or is refused, as an in-place operation that would change placements is.
# It is so that: a slice along the sharded dimension is gathered first, and is no view of the shards any more. The write
# goes into the copy and is lost, on every rank, and nothing is said; along the other dimensions it arrives. With autograd
# the gradient is that of the write which did not happen. `x.copy_(...)` of the whole arrives, as does a write into
# x.to_local().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/slices.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

RANKS = 2
WRITES = {
    "x[:, 0] = x[:, 1]": lambda x: x.__setitem__((slice(None), 0), x[:, 1]),
    "x[:, :3].mul_(2)": lambda x: x[:, :3].mul_(2),
    "x[:, 1:].add_(1)": lambda x: x[:, 1:].add_(1),
    "x.select(1, -1).zero_()": lambda x: x.select(1, -1).zero_(),
    "x.chunk(2, 1)[0].neg_()": lambda x: x.chunk(2, 1)[0].neg_(),
    "x.copy_(x.roll(1, 1))": lambda x: x.copy_(x.roll(1, 1)),
}


def look(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh, before = init_device_mesh("cpu", (RANKS,)), torch.arange(1.0, 33.0).view(4, 8)
    arrived = {}
    for name, write in WRITES.items():
        want = before.clone()
        write(want)
        for dim in (0, 1):
            x = distribute_tensor(before.clone(), mesh, [Shard(dim)])
            write(x)
            found = x.full_tensor()
            arrived[name, dim] = "arrived" if torch.equal(found, want) else "lost" if torch.equal(found, before) else "other"
    leaf = distribute_tensor(before.clone(), mesh, [Shard(1)]).requires_grad_()
    x = leaf * 1
    x[:, :3].mul_(2)
    x.sum().backward()
    value, gradient = x.full_tensor()[0, 0].item(), leaf.grad.full_tensor()[0, 0].item()
    if rank == 0:
        print(f"torch {torch.__version__}, {RANKS} ranks, x of (4, 8)")
        for (name, dim), what in arrived.items():
            print(f"{name:26} sharded along dimension {dim}: {what}")
        print(f"with autograd, 1 times 2 in place: {value}, its gradient {gradient}")
    lost = {case for case, what in arrived.items() if what == "lost"}
    holds = lost == {(name, 1) for name in WRITES if "copy_" not in name} and (value, gradient) == (1, 2)
    holds = holds and "other" not in arrived.values()
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not holds)


if __name__ == "__main__":
    try:
        torch.multiprocessing.spawn(look, (sys.argv[1],), RANKS)
    except torch.multiprocessing.ProcessExitedException:
        sys.exit(1)
PY
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore "$folder/slices.py" "$folder"
