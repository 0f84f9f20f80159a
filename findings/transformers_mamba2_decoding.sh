#!/usr/bin/env bash
# One would guess: a Mamba-2 model gives a token the same logits from its cache as from the whole sequence, to rounding.
# It is so that: transformers' steps of decoding do not keep dt within the configuration's time_step_limit, which its
# pass over a whole sequence does. Where the limit binds, generated tokens depend on `use_cache`; without a limit the
# two agree to 1e-6. To compare with such a model, generate with use_cache=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/limits.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2}
config = transformers.Mamba2Config(vocab_size=61, expand=2, chunk_size=16, **sizes)
model = transformers.Mamba2ForCausalLM(config).eval()
prompt = torch.randint(1, 61, (2, 40))
apart = {}
with torch.no_grad():
    for weight in model.parameters():
        weight.add_(0.3 * torch.randn(weight.shape))
    for most in (float("inf"), 0.05):
        for layer in model.backbone.layers:
            layer.mixer.time_step_limit = (0.0, most)
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )
        whole = model(made.sequences[:, :41], use_cache=False).logits[:, -1]
        apart[most] = float((made.logits[1] - whole).abs().max() / whole.abs().max())
        print(f"time_step_limit (0, {most}): from the cache and from the whole sequence, {apart[most]:.0e} of the largest apart")
print("torch", torch.__version__, "transformers", transformers.__version__)
raise SystemExit(not (apart[float("inf")] < 1e-4 < 1e-2 < apart[0.05]))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/limits.py" 2>/dev/null
