"""Tiny models of the transformers families whose recurrent layers `parallelize` knows, for every table of tests.

    from families import FAMILIES, tiny
    model = tiny("Bamba")

A family is a causal language model of a few thousand numbers, of which no two are alike, and whose states last for
hundreds of tokens: what is lost shows.
"""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 61
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_expand": 2, "mamba_d_conv": 4,
    "mamba_n_groups": 2, "mamba_chunk_size": 16,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}

# Name -> what its configuration is given. Each has whichever of its options changes what a layer computes.
FAMILIES: dict[str, dict[str, Any]] = {
    "Mamba2": {
        **_SIZES, **_TOKENS, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2,
        "conv_kernel": 4, "expand": 2, "chunk_size": 16, "time_step_limit": (0.01, 2.0),
    },
    "Bamba": {
        **_SIZES, **_HEADS, **_MAMBA, **_TOKENS, "num_hidden_layers": 3, "attn_layer_indices": [1],
        "time_step_limit": (0.01, 2.0),
    },
    "FalconH1": {
        **_SIZES, **_HEADS, **_MAMBA, **_TOKENS, "num_hidden_layers": 2, "mamba_d_ssm": 64, "ssm_in_multiplier": 1.5,
        "ssm_out_multiplier": 0.7, "ssm_multipliers": [0.9, 1.2, 0.8, 1.1, 0.6], "attention_in_multiplier": 1.25,
        "attention_out_multiplier": 0.9, "key_multiplier": 0.8, "embedding_multiplier": 1.3, "lm_head_multiplier": 0.7,
    },
    "FalconH1 normed": {
        **_SIZES, **_HEADS, **_MAMBA, **_TOKENS, "num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_rms_norm": True,
        "mamba_norm_before_gate": True,
    },
    "GraniteMoeHybrid": {
        **_SIZES, **_HEADS, **_MAMBA, **_TOKENS, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16, "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 1.4,
    },
    "GraniteMoeHybrid rope": {
        **_SIZES, **_HEADS, **_MAMBA, **_TOKENS, "num_hidden_layers": 2, "layer_types": ["attention", "mamba"],
        "num_local_experts": 0, "shared_intermediate_size": 16, "position_embedding_type": "rope",
    },
    "NemotronH": {
        **_SIZES, **_HEADS, **_TOKENS, "layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp"],
        "head_dim": 8, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
        "conv_kernel": 4, "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "time_step_min": 0.01,
    },
    "xLSTM": {
        **_SIZES, **_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 16, "chunk_size": 16, "eps": 1e-3,
        "norm_eps": 0.1,  # or the norm would undo what a gate does to a head's size, and its gradient be rounding
    },
    "Zamba2": {
        **_SIZES, **_TOKENS, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_d_state": 16, "mamba_ngroups": 2, "n_mamba_heads": 8, "mamba_expand": 2, "chunk_size": 16,
        "num_attention_heads": 4, "num_key_value_heads": 4, "use_mem_rope": True, "use_shared_attention_adapter": True,
        "adapter_rank": 4, "num_mem_blocks": 1, "time_step_min": 0.01,
    },
}  # fmt: skip


def tiny(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """The family's model with a language head, evaluating, in fp32 on the CPU; changes: of its configuration."""
    import transformers

    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**{**FAMILIES[name], **changes})
    return enlarged(getattr(transformers, f"{kind}ForCausalLM")(config).eval(), seed)


@torch.no_grad()
def enlarged(model: Any, seed: int = 0) -> Any:
    """The model with random numbers large enough for a lost state to show: at their usual size it hardly does.
    Always the same ones, also in threads, which share PyTorch's own generator."""
    generator = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if key.endswith("A_log"):
            p.uniform_(-6.0, -1.0, generator=generator)  # decays of 0.998 to 0.7 a step of 1
        elif key.endswith("dt_bias"):
            p.uniform_(-2.0, 0.5, generator=generator)
        elif key.endswith("igate_preact.bias"):
            p.uniform_(-4.0, 1.0, generator=generator)
        elif key.endswith("fgate_preact.bias"):
            p.uniform_(1.0, 5.0, generator=generator)
        elif key.endswith(("conv1d.weight", "embeddings.weight", "embed_tokens.weight")):
            p.normal_(0.0, 0.5, generator=generator)
        elif p.ndim > 1:
            p.normal_(0.0, (0.3 if "adapter" in key else 1.0) * p.shape[-1] ** -0.5, generator=generator)
        else:
            p.normal_(0.0 if key.endswith("bias") else 1.0, 0.1, generator=generator)
    return model


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, where the largest number expected is 1."""
    return float((out - expected).abs().max() / expected.abs().max())


__all__ = ["FAMILIES", "VOCABULARY", "enlarged", "relative", "tiny"]
