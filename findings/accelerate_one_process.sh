#!/usr/bin/env bash
# One would guess: `accelerate launch --num_processes 2` starts two processes, or says that it will not.
# It is so that: on a machine without a GPU it starts one, with --cpu too, and with a config file of two processes and
# `use_cpu: true`, and says nothing; what trains then is one rank on all of the data. With --multi_gpu and
# ACCELERATE_USE_CPU=true in the environment, of all things, it starts two, over gloo.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 accelerate==1.15.0
cat >"$folder/who.py" <<'PY'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
accelerator.print(f"{accelerator.num_processes} of 2 processes")
accelerator.end_training()
PY
cat >"$folder/two.yaml" <<'YAML'
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 1
num_processes: 2
machine_rank: 0
use_cpu: true
mixed_precision: 'no'
YAML
export HF_HOME=$folder OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
seen() { PATH=$folder/venv/bin:$PATH accelerate launch "$@" "$folder/who.py" 2>/dev/null | tail -n 1; }
plain=$(seen --num_processes 2)
cpu=$(seen --cpu --num_processes 2)
file=$(seen --config_file "$folder/two.yaml")
gpus=$(ACCELERATE_USE_CPU=true seen --multi_gpu --num_processes 2 --main_process_port 0)
printf '%-42s %s\n' "--num_processes 2" "$plain" "--cpu --num_processes 2" "$cpu" "the config file" "$file" \
    "ACCELERATE_USE_CPU=true and --multi_gpu" "$gpus"
[[ $plain == "1 of 2 processes" && $cpu == "$plain" && $file == "$plain" && $gpus == "2 of 2 processes" ]]
