"""transformers' own MiniMax lightning layer against the same layer after `leetdist.parallelize`, on one device.

    python benchmarks/minimax_layer.py --tokens 131072                                # a GPU: hidden 4,096, bf16
    python benchmarks/minimax_layer.py --tokens 16384 --hidden 1024 --device cpu      # fp32

Checks first, each against the layer in fp64 or fp32 at a shorter length; then times forward, and forward + backward.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.place import needs_gpu
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

import leetdist
from leetdist.reference import relative_error


def layer_of(hidden: int, seed: int = 0) -> MiniMaxLightningAttention:
    """MiniMax-Text-01's layer: heads of 128, blocks of 256; a layer from the middle of a stack."""
    config = MiniMaxConfig(
        hidden_size=hidden, num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, head_dim=128,
        num_hidden_layers=8, layer_types=["linear_attention"] * 8,
    )  # fmt: skip
    torch.manual_seed(seed)
    return MiniMaxLightningAttention(config, 3)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, position_embeddings=None, attention_mask=None)[0]


def forward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    with torch.no_grad():
        call(layer, x)


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    call(layer, x).backward(dy)


def project(projections: list[nn.Module], x: Tensor) -> None:
    with torch.no_grad():
        for projection in projections:
            projection(x)


def timed(
    functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each, taken in turns, and the most memory in GiB beyond what was there before."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    peaks = {}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if repeat:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(each) for name, each in times.items()}, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", help="cuda, or cpu (cuda)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device is None:
        needs_gpu(parser, "--device cpu --tokens 16384 --hidden 1024 takes minutes on a CPU")
    device = torch.device(options.device or "cuda")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    theirs = layer_of(options.hidden).to(device)
    ours = leetdist.parallelize(copy.deepcopy(theirs), None)
    short = torch.randn(1, 2048, options.hidden, device=device)
    with torch.no_grad():
        exact = call(copy.deepcopy(theirs).double(), short.double())
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        errors = {
            name: relative_error(call(layer, short.to(dtype)), exact)
            for name, layer in (("transformers", theirs), ("leetdist", ours))
        }
    print("relative error against fp64 at 2,048 tokens:", {k: f"{v:.1e}" for k, v in errors.items()})
    if not errors["leetdist"] < 2e-2:
        raise SystemExit("leetdist's layer is wrong: nothing is timed")

    x = torch.randn(1, options.tokens, options.hidden, device=device, dtype=dtype)
    dy = torch.randn_like(x)
    result: dict[str, Any] = {
        "command": f"python benchmarks/minimax_layer.py --tokens {options.tokens} --hidden {options.hidden} "
        f"--device {device.type} --repeats {options.repeats}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "python": platform.python_version(), "dtype": str(dtype).removeprefix("torch."),
        "tokens": options.tokens, "hidden": options.hidden, "relative_error": errors, "ms": {}, "peak_gib": {},
    }  # fmt: skip
    # What no operator can save: the projections and the gate.
    projections = [theirs.qkv_proj, theirs.output_gate, theirs.out_proj]
    layers = {"transformers": theirs, "leetdist": ours}
    for what, function in (("forward", forward), ("forward + backward", forward_backward)):
        x.requires_grad_(function is forward_backward)
        calls: dict[str, Callable[[], Any]] = {n: partial(function, layer, x, dy) for n, layer in layers.items()}
        if function is forward:
            calls["projections alone"] = partial(project, projections, x)
        ms, peak = timed(calls, device, options.repeats)
        result["ms"][what], result["peak_gib"][what] = ms, peak
        print(
            f"{what:<20}" + "   ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
            + f"   {ms['transformers'] / ms['leetdist']:.1f} x   GiB: "
            + ", ".join(f"{name} {value:.1f}" for name, value in peak.items())
        )  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
