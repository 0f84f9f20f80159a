#!/usr/bin/env bash
# One would guess: what attention_mask hides changes nothing, wherever it stands: in a batch whose second turn is padded
# on the left and goes on from a cache, too. So it is with attention, to rounding.
# It is so that: transformers' models with a state zero what goes into a padded token, and let the token itself happen:
# the convolution's window moves on, and the state decays by dt's bias as by any token. Padding before a row's first
# token finds an empty state, and is harmless with these; padding inside a row makes it forget, unsaid. Go on with rows
# of one length, or read the whole rows again, padded at their beginning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/padding.py" <<'PY'
import torch
import transformers

sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
sizes |= {"num_key_value_heads": 2, "head_dim": 16}
mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
delta = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
mixed = ["linear_attention", "full_attention"]
kinds = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes)),
    "Falcon-H1": (transformers.FalconH1ForCausalLM, transformers.FalconH1Config(**sizes, **mamba, mamba_d_ssm=64)),
    "Bamba": (transformers.BambaForCausalLM, transformers.BambaConfig(**sizes, **mamba, attn_layer_indices=[1])),
    "Qwen3.5": (transformers.Qwen3_5ForCausalLM, transformers.Qwen3_5TextConfig(**sizes, **delta, layer_types=mixed)),
}
error = {}
torch.set_grad_enabled(False)
for name, (kind, config) in kinds.items():
    torch.manual_seed(0)
    model, rows = kind(config).eval(), torch.randint(1, 61, (2, 14))
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn(weight.shape))
    first, second = rows[:, :8], rows[:, 8:].clone()
    second[1, :2] = 0  # row 1 says two tokens less in its second turn
    text = torch.cat([rows[1:, :8], rows[1:, 10:]], 1)
    want = model(text, use_cache=False).logits[:, -4:]
    turn = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    mask = torch.cat([torch.ones_like(first), turn], 1)
    positions = (mask.cumsum(1) - 1)[:, 8:]
    for place in ("before the text", "inside the text"):
        if place == "inside the text":
            cache = model(first, attention_mask=mask[:, :8], use_cache=True).past_key_values
            found = model(second, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        else:
            padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), text], 1)
            hidden = (padded != 0).long()
            found = model(padded, attention_mask=hidden, position_ids=(hidden.cumsum(1) - 1).clamp(min=0), use_cache=False)
        error[name, place] = float((found.logits[-1:, -4:] - want).norm() / want.norm())
        print(f"{name}: two tokens of padding {place}: relative error of what follows {error[name, place]:.0e}")
print("torch", torch.__version__, "transformers", transformers.__version__)
wrong = [case for case in error if case[1] == "inside the text" and case[0] != "Llama"]
right = max(value for case, value in error.items() if case not in wrong)
raise SystemExit(not (right < 1e-4 < 1e-2 < min(error[case] for case in wrong)))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/padding.py" 2>/dev/null
