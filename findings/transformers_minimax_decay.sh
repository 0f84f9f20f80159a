#!/usr/bin/env bash
# One would guess: a model that is loaded in bf16 decodes with about the error of its pass over a prompt.
# It is so that: transformers' MiniMax keeps the slopes of its lightning layers in a buffer, which is loaded in bf16 too,
# and decodes by a decay of exp(-slope) a token. Between 1 - 2^-8 and 1, bf16 has no number: slow heads forget nothing, or
# at up to twice their rate. The pass over a prompt takes a block of tokens at once, whose decay bf16 holds well, so that
# generated text is read otherwise than the same text in a prompt.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/decay.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 16}
config = transformers.MiniMaxConfig(**sizes, num_key_value_heads=2, head_dim=16, num_local_experts=2, pad_token_id=0)
model, text = transformers.MiniMaxForCausalLM(config).eval(), torch.randint(2, 61, (1, 600))
torch.set_grad_enabled(False)
for weight in model.parameters():
    weight.add_(0.02 * torch.randn(weight.shape))
exact, error = model(text, use_cache=False).logits[:, 550:], {}


def compare(name, model):
    """Print by how much the last 50 tokens' logits are off, with 64 tokens read at once and with all."""
    cache, found = model(text[:, :64], use_cache=True).past_key_values, []
    for token in text[0, 64:]:
        found.append(model(token.view(1, 1), past_key_values=cache, use_cache=True).logits)
    for way, logits in (("one by one", torch.cat(found, 1)[:, -50:]), ("at once", model(text, use_cache=False).logits[:, 550:])):
        error[name, way] = float((logits.float() - exact).norm() / exact.norm())
        print(f"{name}, {way}: relative error of the logits {error[name, way]:.0e}")


model.save_pretrained("model")
loaded = transformers.MiniMaxForCausalLM.from_pretrained("model", dtype=torch.bfloat16).eval()
compare("fp32", model)
compare("bf16", loaded)
off = 0
for layer in (1, 3, 5):  # the last one's slopes are next to 0
    slope, low = (x.model.layers[layer].self_attn.slope_rate for x in (model, loaded))
    used = -torch.exp(-low).float().log()
    off += int(((used - slope).abs() > 0.25 * slope).sum())
    print(f"layer {layer}, decays in decoding: {torch.exp(-low).flatten()[-4:].tolist()}, by the model: {torch.exp(-slope).flatten()[-4:].tolist()}")
    slope.copy_(used)  # for decoding in fp32 by bf16's decays
print(f"{off} of 48 heads decay at a rate that is off by a quarter or more")
compare("fp32 with bf16's decays", model)
print("torch", torch.__version__, "transformers", transformers.__version__)
apart = min(error["bf16", "one by one"], error["fp32 with bf16's decays", "one by one"])
holds = off and error["fp32", "one by one"] < 1e-4 and apart > 4 * error["bf16", "at once"]
raise SystemExit(not holds)
PY
cd "$folder"
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/decay.py" 2>/dev/null
