#!/usr/bin/env bash
# One would guess: packed documents, told to a Mamba-2 model by the seq_idx of transformers' DataCollatorWithFlattening,
# are kept apart, or refused where what keeps them apart is not installed, as Falcon-H1 and Bamba refuse them.
# It is so that: Mamba2ForCausalLM takes seq_idx and does not hand it on, whatever is installed: each document is read
# after the one before it, and nothing is said. Mamba2Model, which is inside it, hands it on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/documents.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "num_heads": 4, "head_dim": 16}
attention = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 64}
models = {
    "Mamba2ForCausalLM": transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, n_groups=1, chunk_size=8)),
    "FalconH1ForCausalLM": transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(vocab_size=61, hidden_size=32, num_hidden_layers=2, **attention, **mamba)
    ),
}
models["Mamba2Model"] = models["Mamba2ForCausalLM"].backbone
documents = torch.randint(1, 61, (20,)).split([8, 12])
collate = transformers.DataCollatorWithFlattening(return_seq_idx=True, return_tensors="pt")
batch = collate([{"input_ids": document.tolist()} for document in documents])
print({name: batch[name].tolist() for name in ("position_ids", "seq_idx")})
inputs, seen = {"input_ids": batch["input_ids"], "seq_idx": batch["seq_idx"], "use_cache": False}, {}
torch.set_grad_enabled(False)
for name, model in models.items():
    if name != "Mamba2Model":
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    for mode in (True, False):
        model.train(mode)
        alone = model(documents[1][None], use_cache=False)[0]
        try:
            packed = model(**inputs)[0][:, 8:]
            seen[name, mode] = float((packed - alone).norm() / alone.norm())
        except ValueError as error:
            seen[name, mode] = str(error)
        print(f"{name}, training {mode}: the second document, packed and alone: {seen[name, mode]}")
print("torch", torch.__version__, "transformers", transformers.__version__)
silent = [isinstance(seen["Mamba2ForCausalLM", mode], float) and seen["Mamba2ForCausalLM", mode] > 1e-2 for mode in (True, False)]
refused = [isinstance(seen[name, False], str) for name in ("Mamba2Model", "FalconH1ForCausalLM")]
raise SystemExit(not all(silent + refused))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/documents.py" 2>/dev/null
