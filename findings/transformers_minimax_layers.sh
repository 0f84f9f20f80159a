#!/usr/bin/env bash
# One would guess: of a hybrid model's layers it does not matter, to the cache, which kind comes first; least of all in
# the order in which the model was released.
# It is so that: transformers' MiniMax counts its cached tokens in layer 0. Where that is a lightning layer, as in
# MiniMax-Text-01 (seven of them, then one of softmax), the count stays 0, and the masks of the softmax layers are those
# of an empty cache: a prompt padded on the left generates other tokens than alone, several tokens after a cache see only
# one another. One prompt, decoded token by token, is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/layers.py" <<'PY'
import torch
import transformers

sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "block_size": 8, "pad_token_id": 0}
orders = {"softmax first": ["full_attention", "linear_attention"] * 2, "lightning first": ["linear_attention", "full_attention"] * 2}
seen = {}
torch.set_grad_enabled(False)
for order, layers in orders.items():
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(**sizes, layer_types=layers, bos_token_id=1, eos_token_id=None)
    model, text = transformers.MiniMaxForCausalLM(config).eval(), torch.randint(2, 61, (1, 20))
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn(weight.shape))

    def logits(prompt, **options):
        mask = (prompt != 0).long()
        how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(model.generate(prompt, attention_mask=mask, **how, **options).logits)[:, -1]

    whole = model(text, use_cache=False).logits[:, 12:]
    cache = model(text[:, :12], use_cache=True).past_key_values
    count = cache.get_seq_length()
    more = model(text[:, 12:], past_key_values=cache, use_cache=True, position_ids=torch.arange(12, 20)[None]).logits
    short = text[:, :11]
    batch = torch.cat([text, torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1)])
    pairs = {
        "one by one": (logits(text), logits(text, use_cache=False)),
        "several after a cache": (more, whole),
        "padded on the left": (logits(batch), logits(short)),
    }
    print(f"{order}: after 12 tokens the cache counts {count}")
    for case, (found, want) in pairs.items():
        seen[order, case] = float((found - want).norm() / want.norm())
        print(f"{order}: {case}: relative error of the logits {seen[order, case]:.0e}")
print("torch", torch.__version__, "transformers", transformers.__version__)
wrong = {("lightning first", "several after a cache"), ("lightning first", "padded on the left")}
right = max(error for case, error in seen.items() if case not in wrong)
raise SystemExit(not (right < 1e-4 < 1e-2 < min(seen[case] for case in wrong)))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/layers.py" 2>/dev/null
