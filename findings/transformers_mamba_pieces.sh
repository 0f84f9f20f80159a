#!/usr/bin/env bash
# One would guess: a model with a cache takes the next tokens of a text one by one or several at a time, with the same
# logits, as transformers' Mamba-2 and attention models do.
# It is so that: transformers' Mamba, the first, begins its scan from a state of zero whenever it is given more than one
# token, though its convolution goes on from the cache: a prompt in pieces, or the next turn of a conversation, has other
# logits, and nothing is said. Give such a model the tokens one by one, or all from the start.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/pieces.py" <<'PY'
import torch
import transformers

sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16}
kinds = {
    "Mamba": (transformers.MambaForCausalLM, transformers.MambaConfig(**sizes)),
    "Falcon Mamba": (transformers.FalconMambaForCausalLM, transformers.FalconMambaConfig(**sizes)),
    "Mamba-2": (
        transformers.Mamba2ForCausalLM,
        transformers.Mamba2Config(**sizes, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    ),
}
apart = {}
for name, (kind, config) in kinds.items():
    torch.manual_seed(0)
    model, text = kind(config).eval(), torch.randint(1, 61, (1, 20))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
        whole = model(text, use_cache=False).logits[:, 12:]
        for pieces in (1, 8):
            cache, found = model(text[:, :12], use_cache=True).cache_params, []
            for begin in range(12, 20, pieces):
                found.append(model(text[:, begin : begin + pieces], cache_params=cache, use_cache=True).logits)
            apart[name, pieces] = float((torch.cat(found, 1) - whole).norm() / whole.norm())
            print(f"{name}: tokens 12 to 19 after the first 12, {pieces} at a time: relative error {apart[name, pieces]:.0e}")
print("torch", torch.__version__, "transformers", transformers.__version__)
right = max(apart["Mamba-2", 8], *(apart[name, 1] for name in kinds))
raise SystemExit(not (right < 1e-4 < 1e-2 < min(apart["Mamba", 8], apart["Falcon Mamba", 8])))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/pieces.py" 2>/dev/null
