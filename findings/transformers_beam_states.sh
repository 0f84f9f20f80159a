#!/usr/bin/env bash
# One would guess: the score that beam search reports for a text is the text's log-probability, with a cache as without.
# It is so that: beam search puts the cache into its new beams' order by reorder_cache, and transformers' MiniMax keeps
# the states of its lightning layers where reorder_cache does not look, RecurrentGemma in the module itself. A beam goes
# on from another beam's state; texts and scores are wrong, and nothing is said. Give use_cache=False to search with them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cat >"$folder/beams.py" <<'PY'
import torch
import transformers

sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
sizes |= {"head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
experts = {"num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
kinds = {
    "MiniMax": (
        transformers.MiniMaxForCausalLM,
        transformers.MiniMaxConfig(**sizes, num_hidden_layers=2, num_local_experts=2, block_size=8),
    ),
    "RecurrentGemma": (
        transformers.RecurrentGemmaForCausalLM,
        transformers.RecurrentGemmaConfig(**sizes, num_hidden_layers=3, lru_width=32, attention_window_size=64),
    ),
    "Qwen3-Next": (
        transformers.Qwen3NextForCausalLM,
        transformers.Qwen3NextConfig(
            **sizes, **experts, **heads, shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
}
apart = {}
torch.set_grad_enabled(False)
for name, (kind, config) in kinds.items():
    torch.manual_seed(0)
    model, prompt = kind(config).eval(), torch.randint(2, 61, (2, 10))
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn(weight.shape))
    for cached in (True, False):
        for beams in (1, 4):
            made = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, num_beams=beams,
                length_penalty=0.0, use_cache=cached, return_dict_in_generate=True, output_scores=True,
            )
            text = made.sequences
            told = model.compute_transition_scores(text, made.scores, getattr(made, "beam_indices", None)) if beams > 1 else (
                model.compute_transition_scores(text, made.scores, normalize_logits=True)
            )
            true = model(text, use_cache=False).logits[:, 9:-1].log_softmax(-1).gather(2, text[:, 10:, None]).sum((1, 2))
            apart[name, cached, beams] = float((told.sum(1) - true).abs().max())
            print(f"{name}, use_cache {cached}, {beams} beam(s): told and true log-probabilities of the texts differ by {apart[name, cached, beams]:.0e}")
print("torch", torch.__version__, "transformers", transformers.__version__)
wrong = {("MiniMax", True, 4), ("RecurrentGemma", True, 4)}
right = max(difference for case, difference in apart.items() if case not in wrong)
raise SystemExit(not (right < 1e-3 < 1e-1 < min(apart[case] for case in wrong)))
PY
HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/beams.py" 2>/dev/null
