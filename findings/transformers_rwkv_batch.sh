#!/usr/bin/env bash
# One would guess: a batch of prompts of one length, decoded from its cache, gives each prompt the logits that it gets
# alone, in any model.
# It is so that: transformers' RWKV, given one token a row and a state, takes the token before it as (B, C), where the
# rows are (B, 1, C). Broadcast, each row becomes B tokens, mixed with one row's token before each, and what is returned
# last is mixed with the last row's: what is generated for one text depends on the others of its batch. Nothing is said,
# and a batch of one is right. Decode such texts one by one, or with use_cache=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/batch.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64}
config = transformers.RwkvConfig(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)
model, texts = transformers.RwkvForCausalLM(config).eval(), torch.randint(2, 61, (3, 13))
torch.set_grad_enabled(False)
for weight in model.parameters():
    weight.add_(0.2 * torch.randn(weight.shape))
whole = model(texts, use_cache=False).logits[:, -1]
error = {}
for step in (1, 2):
    for rows in (1, 3):
        before = model(texts[:rows, :-step], use_cache=True)
        after = model(texts[:rows, -step:], state=before.state, use_cache=True).logits
        error[step, rows] = float((after[:, -1] - whole[:rows]).norm() / whole[:rows].norm())
        print(f"{step} token(s) after {13 - step}, batch of {rows}: logits {tuple(after.shape)}, relative error {error[step, rows]:.0e}")
made = {}
for rows in (1, 3):
    for cached in (True, False):
        made[rows, cached] = model.generate(texts[:rows], max_new_tokens=8, do_sample=False, use_cache=cached)[0, 13:].tolist()
        print(f"generated for the first text, batch of {rows}, use_cache {cached}: {made[rows, cached]}")
print("torch", torch.__version__, "transformers", transformers.__version__)
same = made[1, True] == made[1, False] == made[3, False] != made[3, True]
raise SystemExit(not (same and max(error[1, 1], error[2, 1], error[2, 3]) < 1e-4 < 1e-2 < error[1, 3]))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/batch.py" 2>/dev/null
