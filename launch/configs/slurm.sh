#!/usr/bin/env bash
# Several nodes under Slurm: sbatch launch/configs/slurm.sh --text /data/books --sequence-parallel 8 --tokens 1048576
# One torchrun a node; the ranks of a node get consecutive numbers, so that up to 8 ranks of a sequence share NVLink.
#SBATCH --job-name=leetdist
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=runs/%j.log
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8
# --resume: a requeued job goes on from its newest checkpoint. --out must be a folder that all nodes see.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head:29500" -m leetdist.launch.train --model 100m --fsdp --checkpointing --resume \
    --out "runs/$SLURM_JOB_NAME" "$@"
