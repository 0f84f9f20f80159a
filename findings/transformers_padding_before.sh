#!/usr/bin/env bash
# One would guess: prompts of several lengths, padded on the left and told by attention_mask, generate together what each
# generates alone, as they do with transformers' Llama, Mamba-2, and hybrids such as Falcon-H1.
# It is so that: xLSTM takes attention_mask and reads the padding as text: shorter prompts get other logits and other
# tokens. RecurrentGemma heeds the mask in its attention alone; its recurrent layers read the padding too. Nothing is said.
# Generate with these from prompts of one length, or one by one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/padding.py" <<'PY'
import torch
import transformers

ids = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
sizes = {**ids, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
two = {**ids, "hidden_size": 32, "num_hidden_layers": 2}
kinds = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes, num_hidden_layers=2)),
    "Mamba-2": (
        transformers.Mamba2ForCausalLM,
        transformers.Mamba2Config(**two, num_heads=4, head_dim=16, state_size=16, n_groups=1, chunk_size=8),
    ),
    "RecurrentGemma": (
        transformers.RecurrentGemmaForCausalLM,
        transformers.RecurrentGemmaConfig(**sizes, num_hidden_layers=3, lru_width=32, attention_window_size=64),
    ),
    "xLSTM": (
        transformers.xLSTMForCausalLM,
        transformers.xLSTMConfig(**{**two, "hidden_size": 64}, num_heads=4, qk_dim_factor=1.0),
    ),
}
error, same = {}, {}
torch.set_grad_enabled(False)
for name, (kind, config) in kinds.items():
    torch.manual_seed(0)
    model, prompts = kind(config).eval(), torch.randint(2, 61, (2, 20))
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn(weight.shape))

    def generate(rows):
        made = model.generate(
            rows, attention_mask=(rows != 0).long(), max_new_tokens=6, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )
        return made.logits[0], made.sequences[:, rows.shape[1] :]

    alone, text = generate(prompts[:1, 5:])
    padded = prompts.clone()
    padded[0, :5] = 0
    together, texts = generate(padded)
    error[name] = float((together[:1] - alone).norm() / alone.norm())
    same[name] = torch.equal(texts[:1], text)
    print(f"{name}: 15 tokens after 5 of padding, and alone: logits {error[name]:.0e} apart, the same text: {same[name]}")
print("torch", torch.__version__, "transformers", transformers.__version__)
wrong = ("RecurrentGemma", "xLSTM")
holds = all(error[name] > 1e-2 if name in wrong else error[name] < 1e-4 and same[name] for name in kinds) and not same["xLSTM"]
raise SystemExit(not holds)
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/padding.py" 2>/dev/null
