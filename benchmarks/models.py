"""Mamba-2 models of transformers: their own code beside `leetdist.parallelize`, prefill and training step.

    python benchmarks/models.py --hidden 256 --tokens 8192 --device cpu                 # every family, fp32
    python benchmarks/models.py --family NemotronH --hidden 2048 --layers 28 --tokens 131072 --code leetdist
    torchrun --nproc-per-node=2 benchmarks/models.py --family NemotronH ... --code leetdist  # one sequence, two GPUs

Random weights, bf16 on a GPU. First the code is compared with transformers' own in fp32 on fewer tokens; then times are
taken, in turns. Prefill is a forward with a cache that returns the last token's logits; a step is forward, backward,
with activation checkpointing, and AdamW. The own code takes mamba_ssm's kernels where they can be imported, and PyTorch
otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import inspect
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from common.place import needs_gpu
from common.revision import commit
from common.warm import tune_in_parallel

import leetdist
from leetdist.reference import relative_error

VOCABULARY = 16384
CHECKED = 1024  # tokens of the comparison
FAMILIES = ("Mamba2", "Bamba", "FalconH1", "GraniteMoeHybrid", "NemotronH", "Zamba2")


def configuration(family: str, hidden: int, layers: int) -> Any:
    """The family's own proportions: heads of 64 and states of 128, twice as wide as the model; softmax heads of 128."""
    heads = hidden // 32  # of 64, in 2 * hidden
    softmax = {"num_attention_heads": max(2, hidden // 128), "num_key_value_heads": max(1, hidden // 256)}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 4 * hidden, "use_cache": True}
    mamba = {"mamba_n_heads": heads, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2}
    middle = layers // 2
    kinds = ["attention" if i in (middle, layers - 2) else "mlp" if i % 2 else "mamba" for i in range(layers)]
    more: dict[str, dict[str, Any]] = {
        "Mamba2": {"num_heads": heads, "head_dim": 64, "state_size": 128, "num_hidden_layers": layers},
        "Bamba": {**softmax, **mamba, "num_hidden_layers": layers, "attn_layer_indices": [middle]},
        "FalconH1": {**softmax, **mamba, "num_hidden_layers": layers, "mamba_d_ssm": 2 * hidden},
        "GraniteMoeHybrid": {
            **softmax, **mamba, "num_hidden_layers": layers, "num_local_experts": 0,
            "shared_intermediate_size": 4 * hidden,
            "layer_types": ["attention" if i == middle else "mamba" for i in range(layers)],
        },
        "NemotronH": {
            **softmax, "head_dim": 128, "mamba_num_heads": heads, "mamba_head_dim": 64, "ssm_state_size": 128,
            "layers_block_type": kinds,
        },
        "Zamba2": {
            "num_hidden_layers": layers, "n_mamba_heads": heads, "mamba_d_state": 128,
            "layers_block_type": ["hybrid" if i == middle else "mamba" for i in range(layers)],
            "num_attention_heads": max(2, hidden // 64), "num_key_value_heads": max(2, hidden // 64),
        },
    }  # fmt: skip
    return getattr(transformers, f"{family}Config")(**sizes, **more[family])


def build(family: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with device:
        model = getattr(transformers, f"{family}ForCausalLM")(configuration(family, options.hidden, options.layers))
    return model.to(dtype).eval()


def code_of(family: str) -> Any:
    """transformers' module of the family."""
    name = {"NemotronH": "nemotron_h", "FalconH1": "falcon_h1"}.get(family, family.lower())
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def own_kernels(family: str) -> str:
    """What the family's own scan is computed by; its fused training kernel is left out, which needs causal_conv1d."""
    module = code_of(family)
    if hasattr(module, "mamba2_split_conv1d_scan_combined"):
        module.mamba2_split_conv1d_scan_combined = lambda *_, **__: None
    with contextlib.suppress(ImportError):
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        tune_in_parallel()
        return "mamba_ssm"
    return "PyTorch"


def prefill(model: Any, batch: dict[str, torch.Tensor], mesh: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], use_cache=True, logits_to_keep=1).logits


class Step:
    """A step of training: the model, wrapped where there are several ranks, and its optimizer."""

    def __init__(self, model: Any, mesh: Any) -> None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model if mesh is None else torch.nn.parallel.DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def __call__(self, _: Any, batch: dict[str, torch.Tensor], mesh: Any) -> torch.Tensor:
        local = batch if mesh is None else leetdist.shard_batch(batch, mesh, check=False)
        loss = self.model(**local, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def checked(
    models: dict[str, Any], family: str, options: argparse.Namespace, device: torch.device, mesh: Any
) -> dict[str, float]:
    """Relative errors of each code's logits against transformers' own in fp32; on ranks those of the last token."""
    ids = torch.randint(VOCABULARY, (1, CHECKED), device=device, generator=torch.Generator(device).manual_seed(2))
    module = code_of(family)
    scan, module.mamba2_chunk_scan = module.mamba2_chunk_scan, inspect.unwrap(module.mamba2_chunk_scan)  # PyTorch's
    with torch.no_grad():
        exact = build(family, options, device, torch.float32)(ids, use_cache=False).logits
        module.mamba2_chunk_scan = scan
        if mesh is not None:
            return {name: relative_error(prefill(model, {"input_ids": ids}, mesh), exact[:, -1:])
                    for name, model in models.items()}  # fmt: skip
        return {name: relative_error(model(ids, use_cache=False).logits, exact) for name, model in models.items()}


def timed(calls: dict[str, Callable[[], Any]], device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds and the peak of memory in GiB of each; or in words, why not. On a CPU the least of the process's
    own seconds, because what else the machine does only adds to them."""
    on_gpu = device.type == "cuda"
    clock, taken = (time.perf_counter, statistics.median) if on_gpu else (time.process_time, min)
    times: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, Any] = {}
    for repeat in range(options.repeats + 1):
        for name, call in calls.items():
            if isinstance(found.get(name), str):
                continue
            gc.collect()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = clock()
            try:
                call()
            except torch.OutOfMemoryError:
                found[name] = "out of memory"
                torch.cuda.empty_cache()
                continue
            if on_gpu:
                torch.cuda.synchronize()
            if repeat:  # the first one compiles
                times[name].append(clock() - begin)
                peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
                found[name] = {"seconds": taken(times[name]), "peak_gib": peak}
    return found


def measure(family: str, options: argparse.Namespace, device: torch.device, mesh: Any) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {code: build(family, options, device, dtype) for code in options.code}
    result: dict[str, Any] = {"family": family, "ranks": 1 if mesh is None else mesh.size(), "passes": {}}
    result["parameters"] = sum(p.numel() for p in next(iter(models.values())).parameters())
    if "own" in models:
        result["own scan by"] = own_kernels(family)
    if "leetdist" in models:
        leetdist.parallelize(models["leetdist"], mesh)
    result["relative_error"] = errors = checked(models, family, options, device, mesh)
    if not max(errors.values()) < (1e-4 if device.type == "cpu" else 5e-2):
        raise SystemExit(f"{family}: {errors}; nothing is timed")
    for tokens in options.tokens:
        ids = torch.randint(VOCABULARY, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(1))
        batch = {"input_ids": ids, "labels": ids}
        for name in options.passes:
            for model in models.values():
                model.eval()
            runs = {code: Step(model, mesh) if name == "step" else prefill for code, model in models.items()}
            calls = {code: partial(run, models[code], batch, mesh) for code, run in runs.items()}
            found = timed(calls, device, options)
            result["passes"][f"{name} {tokens}"] = found
            for code, of in found.items():
                said = of if isinstance(of, str) else f"{of['seconds']:.3f} s, {tokens / of['seconds']:,.0f} tokens/s"
                memory = "" if isinstance(of, str) or of["peak_gib"] is None else f", {of['peak_gib']:.1f} GiB"
                if mesh is None or dist.get_rank() == 0:
                    print(f"{family} {name} {tokens:,} tokens, {result['ranks']} x {code}: {said}{memory}", flush=True)
            save(options, result)
    return result


RESULTS: list[dict[str, Any]] = []


def save(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """What there is so far, in case that the time ends."""
    if options.out is None or int(os.environ.get("RANK", 0)):
        return
    if result not in RESULTS:
        RESULTS.append(result)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    about = {
        "command": shlex.join(["python", *sys.argv]), "commit": commit(), "device": device, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(), "hidden": options.hidden,
        "layers": options.layers, "vocabulary": VOCABULARY, "results": RESULTS,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(about, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--code", nargs="+", choices=("own", "leetdist"), default=["own", "leetdist"])
    parser.add_argument("--passes", nargs="+", choices=("prefill", "step"), default=["prefill", "step"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", help="cuda, or cpu (cuda)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device is None:
        needs_gpu(parser, "--device cpu --hidden 256 --tokens 8192 takes a minute on a CPU")
    if options.hidden % 256:
        parser.error(f"--hidden must be a multiple of 256, whose heads eight groups share, got {options.hidden}")
    device, mesh = torch.device(options.device or "cuda"), None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if options.code != ["leetdist"]:
            parser.error("transformers' own code has no ranks: --code leetdist")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        mesh = leetdist.device_mesh(sequence=int(os.environ["WORLD_SIZE"]), device_type=device.type)
    for family in options.family:
        measure(family, options, device, mesh)
        gc.collect()
    if mesh is not None:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
