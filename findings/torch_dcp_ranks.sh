#!/usr/bin/env bash
# One would guess: of values that each rank saves under one name with torch.distributed.checkpoint, such as its own state
# and how many tokens that has read, a rank loads back its own; or those of one rank, all of them.
# It is so that: what is no DTensor is taken for equal on all ranks, and each name is kept from one of them, whichever has
# the least to write so far. Of three ranks, all load the tensor of the first beside the count of the second and the list
# of the third, and nothing is said. What is a rank's own needs a name of the rank's own, or is a DTensor;
# DefaultSavePlanner(dedup_save_to_lowest_rank=True) keeps all of the first rank.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/ranks.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

RANKS = 3


def whose(path, names="", **planned):
    """From which rank each value is, of three that every rank saved with its own number and loaded again."""
    rank = dist.get_rank()
    state, tokens, ids = (f"{name}{names}" for name in ("state", "tokens", "ids"))
    dcp.save({state: torch.full((2, 2), float(rank)), tokens: rank, ids: [rank]}, checkpoint_id=path, **planned)
    found = {state: torch.full((2, 2), -1.0), tokens: -1, ids: [-1]}
    dcp.load(found, checkpoint_id=path)
    return int(found[state][0, 0]), found[tokens], found[ids][0]


def look(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    seen = [None] * RANKS
    lowest = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    found = whose(f"{folder}/same"), whose(f"{folder}/own", f".{rank}"), whose(f"{folder}/lowest", planner=lowest)
    dist.all_gather_object(seen, found)
    if rank == 0:
        print(f"torch {torch.__version__}, {RANKS} ranks; the state, the number and the list that a rank loads are of rank")
        for reader, (same, own, lowest) in enumerate(seen):
            print(f"rank {reader}: {same} under one name, {own} under its own, {lowest} with dedup_save_to_lowest_rank")
    holds = len({same for same, _, _ in seen}) == 1 and len(set(seen[0][0])) > 1
    holds &= all(own == (reader,) * 3 and lowest == (0,) * 3 for reader, (_, own, lowest) in enumerate(seen))
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not holds)


if __name__ == "__main__":
    try:
        torch.multiprocessing.spawn(look, (sys.argv[1],), RANKS)
    except torch.multiprocessing.ProcessExitedException:
        sys.exit(1)
PY
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore "$folder/ranks.py" "$folder" 2>/dev/null
