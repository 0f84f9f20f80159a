#!/usr/bin/env bash
# One would guess: the mean squared error of a DTensor and its gradient are those of the whole tensor, as
# `(x - y).square().mean()` has them, and as cross_entropy has, which refuses shards that it would weigh wrongly.
# It is so that: the loss is the plain mean of the ranks' means, wrong where shards are uneven, and its gradient is as many
# times too large as there are ranks, for each rank divides by the elements of its own shard; with even shards the loss is
# right, and only the gradient is not. smooth_l1_loss and huber_loss do the same. Nothing is said. Write the mean out,
# or take reduction="sum" and divide.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/losses.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

RANKS = 2
LOSSES = {
    "mse_loss": F.mse_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "mse_loss, sum / numel": lambda x, y: F.mse_loss(x, y, reduction="sum") / x.numel(),
    "(x - y).square().mean()": lambda x, y: (x - y).square().mean(),
}


def look(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    times = {}
    for rows in (6, 5):
        x, y = torch.randn(2, rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for name, loss in LOSSES.items():
            seen = []
            for placed in (lambda t: t.clone(), lambda t: distribute_tensor(t, mesh, [Shard(0)])):
                leaf = placed(x).requires_grad_()
                value = loss(leaf, placed(y))
                value.backward()
                seen.append([t.full_tensor() if hasattr(t, "full_tensor") else t for t in (value.detach(), leaf.grad)])
            (value, gradient), (found, slope) = seen
            ratio = (slope / gradient).flatten()
            times[name, rows] = float(found / value), float(ratio.min()), float(ratio.max())
    if rank == 0:
        print(f"torch {torch.__version__}, {RANKS} ranks, as many times what the whole tensor has:")
        for (name, rows), (value, least, most) in times.items():
            print(f"{name:24} {rows} rows: loss {value:.4f}, gradient {least:.4f} to {most:.4f}")
    close = lambda a, b: abs(a - b) < 1e-9
    holds = True
    for (name, rows), (value, least, most) in times.items():
        wrong = name.endswith("_loss")
        holds &= close(least, 1 + wrong) and close(most, 1 + wrong) if rows == 6 else (least > 1.5) == wrong
        holds &= close(value, 1) != (wrong and rows == 5)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not holds)


if __name__ == "__main__":
    try:
        torch.multiprocessing.spawn(look, (sys.argv[1],), RANKS)
    except torch.multiprocessing.ProcessExitedException:
        sys.exit(1)
PY
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore "$folder/losses.py" "$folder"
