#!/usr/bin/env bash
# One would guess: a forward call with a cache and without position_ids goes on where the cache ends, as transformers'
# attention models do, and hybrids such as Falcon-H1.
# It is so that: Bamba counts its positions from 0 again in each such call. Its attention layers turn queries and keys by
# wrong angles, and the logits differ without a word. generate() is right, for it gives the positions; a loop of one's own
# has to give position_ids as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/positions.py" <<'PY'
import torch
import transformers

sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
kinds = {
    "Bamba": (transformers.BambaForCausalLM, transformers.BambaConfig(**sizes, attn_layer_indices=[1])),
    "Falcon-H1": (transformers.FalconH1ForCausalLM, transformers.FalconH1Config(**sizes, head_dim=16, mamba_d_ssm=64)),
}
apart = {}
for name, (kind, config) in kinds.items():
    torch.manual_seed(0)
    model, text = kind(config).eval(), torch.randint(1, 61, (1, 20))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
        whole = model(text, use_cache=False).logits[:, 12:]
        for given in (True, False):
            cache = model(text[:, :12], use_cache=True).past_key_values
            told = {"position_ids": torch.arange(12, 20)[None]} if given else {}
            found = model(text[:, 12:], past_key_values=cache, use_cache=True, **told).logits
            apart[name, given] = float((found - whole).norm() / whole.norm())
            print(f"{name}: tokens 12 to 19 after a cache of 12, position_ids given: {given}: relative error {apart[name, given]:.0e}")
print("torch", torch.__version__, "transformers", transformers.__version__)
right = max(apart["Bamba", True], apart["Falcon-H1", True], apart["Falcon-H1", False])
raise SystemExit(not (right < 1e-4 < 1e-2 < apart["Bamba", False]))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/positions.py" 2>/dev/null
