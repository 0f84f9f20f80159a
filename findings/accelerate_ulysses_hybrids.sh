#!/usr/bin/env bash
# One would guess: accelerate, which refuses models with recurrent layers under Ulysses' sequence parallelism, since each
# rank would begin its states from zero, refuses all of them.
# It is so that: it looks for "linear_attention" among the configuration's layer_types. Falcon-H1, whose layers are called
# "hybrid", and LFM2 ("conv") are taken: on the second rank Mamba-2's states and the convolutions begin from zero, the
# logits are wrong, and nothing is said. Llama's are right, and Qwen3.5 is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.3.5 transformers==5.24.0 accelerate==1.15.0 setuptools==80.9.0 wheel ninja
DS_ACCELERATOR=cpu "${pip[@]}" --no-build-isolation deepspeed==0.19.8
cat >"$folder/hybrids.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist

RANKS = 2
WANT = {"Llama": "right", "Falcon-H1": "wrong", "LFM2": "wrong", "Qwen3.5": "refused"}


def models(transformers):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "attn_implementation": "sdpa"}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 64}
    delta = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    mixed = {"layer_types": ["linear_attention", "full_attention"]}
    return {
        "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes)),
        "Falcon-H1": (transformers.FalconH1ForCausalLM, transformers.FalconH1Config(**sizes, **mamba)),
        "LFM2": (transformers.Lfm2ForCausalLM, transformers.Lfm2Config(**sizes, layer_types=["conv", "full_attention"])),
        "Qwen3.5": (transformers.Qwen3_5ForCausalLM, transformers.Qwen3_5TextConfig(**sizes, **delta, **mixed)),
    }


def look(rank, name, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig, DummyOptim, ParallelismConfig

    torch.manual_seed(0)
    kind, config = models(transformers)[name]
    model, text, positions = kind(config).eval(), torch.randint(1, 61, (32,)), torch.arange(32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
        want = model(text[None], position_ids=positions[None], use_cache=False).logits.chunk(RANKS, 1)[rank]
    model.train()
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 0}}
    settings["optimizer"] = {"type": "SGD", "params": {"lr": 0.0}}
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(sp_backend="deepspeed", sp_size=RANKS, sp_handler=handler),
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
    )
    data = torch.utils.data.DataLoader([{"input_ids": text, "position_ids": positions, "labels": text}], batch_size=1)
    try:
        model, _, data = accelerator.prepare(model, DummyOptim(model.parameters()), data)
        batch = next(iter(data))
        with torch.no_grad():
            found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits.float()
        seen = float((found - want).norm() / want.norm())
    except ValueError as error:
        seen = f"refused: {str(error)[:75]}"
    results[rank] = seen
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    holds = True
    for number, (name, want) in enumerate(WANT.items()):
        results = torch.multiprocessing.get_context("spawn").Manager().dict()
        torch.multiprocessing.spawn(look, (name, int(sys.argv[1]) + number, results), RANKS)
        first, second = results[0], results[1]
        errors = second if isinstance(second, str) else f"relative errors of the two ranks' logits {first:.0e}, {second:.0e}"
        print(f"{name}: {errors}", flush=True)
        if isinstance(second, str):
            holds &= want == "refused"
        else:
            holds &= first < 1e-4 and (second < 1e-4 if want == "right" else second > 1e-2 and want == "wrong")
    print("torch", torch.__version__)
    sys.exit(not holds)
PY
export HF_HOME=$folder HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu
export ACCELERATE_USE_DEEPSPEED=true TORCH_EXTENSIONS_DIR=$folder
"$folder/venv/bin/python" "$folder/hybrids.py" "${MASTER_PORT:-29881}" 2>/dev/null | grep -v '^DeepSpeed'
