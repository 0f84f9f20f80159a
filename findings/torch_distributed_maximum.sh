#!/usr/bin/env bash
# One would guess: the gradient of torch.distributed.nn's all_reduce with MAX goes to the rank whose element was the
# largest, as that of torch.maximum does, or is refused, as reduce_scatter_tensor_autograd refuses all but sums.
# It is so that: the backward pass reduces the gradients by the operation of the forward pass. With MAX every rank gets the
# largest of all ranks' gradients, with MIN the smallest, with PRODUCT their product; nothing is said. SUM and AVG are
# right. Write `torch.stack(all_gather(x)).amax(0)`, whose gradient is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/maximum.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather, all_reduce

RANKS, OPS = 3, ("SUM", "AVG", "MAX", "MIN", "PRODUCT")
ALONE = {
    "SUM": lambda x: x.sum(0), "AVG": lambda x: x.mean(0), "MAX": lambda x: x.amax(0), "MIN": lambda x: x.amin(0),
    "PRODUCT": lambda x: x.prod(0),
}


def look(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    x, weight = torch.randn(2, RANKS, 4, generator=torch.Generator().manual_seed(0))
    holds = True
    for name in (*OPS, "MAX, all_gather"):
        all_of_it, own = x.clone().requires_grad_(), x[rank].clone().requires_grad_()
        want = ALONE[name.split(",")[0]](all_of_it)
        (want * weight).sum().backward()  # of all ranks' losses
        if name in OPS:
            found = all_reduce(own.clone(), op=getattr(dist.ReduceOp, name))
        else:
            found = ALONE["MAX"](torch.stack(all_gather(own)))
        (found * weight[rank]).sum().backward()
        right = torch.allclose(found, want), torch.allclose(own.grad, all_of_it.grad[rank], atol=1e-6)
        rights = [None] * RANKS
        dist.all_gather_object(rights, right)
        values, gradients = zip(*rights)
        holds &= all(values) and any(gradients) == all(gradients) == (name not in ("MAX", "MIN", "PRODUCT"))
        if rank == 0:
            as_one = {True: "right", False: "wrong"}
            got, due = ([round(v, 3) for v in t.tolist()] for t in (own.grad, all_of_it.grad[0]))
            print(f"{name}: value {as_one[all(values)]}, gradient {as_one[all(gradients)]}: of rank 0 {got}, wanted {due}")
    if rank == 0:
        print(f"torch {torch.__version__}, {RANKS} ranks")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not holds)


if __name__ == "__main__":
    try:
        torch.multiprocessing.spawn(look, (sys.argv[1],), RANKS)
    except torch.multiprocessing.ProcessExitedException:
        sys.exit(1)
PY
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore "$folder/maximum.py" "$folder"
