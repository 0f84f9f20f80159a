#!/usr/bin/env bash
# One would guess: a causal language model of transformers that is built from its configuration can be trained by
# `model(ids, labels=ids).loss.backward()`.
# It is so that: xLSTM cannot, with more tokens than a chunk (64). Its configuration says use_cache, so that a cache is
# made for training too, and overwritten in place before the backward pass reads it. With use_cache=False it trains.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/train.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "qk_dim_factor": 1.0}
model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**sizes)).train()
ids = torch.randint(61, (2, 150))
seen = []
for options in ({}, {"use_cache": False}):
    try:
        model(ids, labels=ids, **options).loss.backward()
        seen.append("trains")
    except RuntimeError as error:
        seen.append(str(error)[:90])
    print(options, seen[-1])
print("torch", torch.__version__, "transformers", transformers.__version__)
raise SystemExit(not ("inplace" in seen[0] and seen[1] == "trains"))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/train.py" 2>/dev/null
