#!/usr/bin/env bash
# One would guess: a model that from_pretrained loads, it loads under DeepSpeed's ZeRO-3 too, where each rank keeps a part
# of every weight: transformers has a path of its own for that.
# It is so that: xLSTM ends in an IndexError. What makes its initial weights asks for weight.shape[1], and a weight that is
# cut has one dimension, of no elements. It is asked even though all weights are in the checkpoint. Mamba2, saved and
# loaded the same way, loads.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.3.5 transformers==5.24.0 accelerate==1.15.0 setuptools==80.9.0 wheel ninja
DS_ACCELERATOR=cpu "${pip[@]}" --no-build-isolation deepspeed==0.19.8
cat >"$folder/load.py" <<'PY'
import sys

import deepspeed
import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig

deepspeed.init_distributed("gloo")
sizes = {"vocab_size": 61, "num_hidden_layers": 2, "num_heads": 4}
models = {
    "Mamba2": transformers.Mamba2Config(**sizes, hidden_size=32, head_dim=16, state_size=16, n_groups=1),
    "xLSTM": transformers.xLSTMConfig(**sizes, hidden_size=64, qk_dim_factor=1.0),
}
for name, config in models.items():
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(f"{sys.argv[1]}/{name}")
alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
seen = {}
for name in models:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}")
        seen[name] = "loaded"
    except IndexError as error:
        seen[name] = f"IndexError: {error}"
    print(name, "under ZeRO-3:", seen[name])
print("torch", torch.__version__, "transformers", transformers.__version__, "deepspeed", deepspeed.__version__)
raise SystemExit(seen != {"Mamba2": "loaded", "xLSTM": "IndexError: tuple index out of range"})
PY
export HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29871}
"$folder/venv/bin/python" "$folder/load.py" "$folder" 2>/dev/null
