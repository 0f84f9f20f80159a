"""`leetdist doctor`: what this machine has, and what will run on it for a few typical calls.

For each call: the kernels by name, version and configuration; for each faster one, why not; and what to install for it.
On a GPU the kernels are compiled first, as a call would, for what cannot be compiled does not run. `--json`: the same
for programs.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable
from typing import Any

import torch

import leetdist
from leetdist.engine.checks import describe
from leetdist.kernels.runtime.settings import settings
from leetdist.launch import commands
from leetdist.launch.runtime import choose_device
from leetdist.operators.choice import Choice
from leetdist.operators.dispatch import decoder
from leetdist.operators.methods import kernels_for, method_for
from leetdist.operators.problem import Problem
from leetdist.operators.words import in_words, refusals

PACKAGES = ("accelerate", "deepspeed", "transformers")
HEADS, TOKENS = 32, 131_072
# What people call: name, dtype, head size. 100 numbers in bf16 are no multiple of 16 bytes.
CALLS = (
    ("bf16, heads of 128", torch.bfloat16, 128),
    ("fp32, heads of 128", torch.float32, 128),
    ("bf16, heads of 256", torch.bfloat16, 256),
    ("bf16, heads of 100", torch.bfloat16, 100),
)


def main(argv: list[str]) -> int:
    args = commands.doctor().parse_args(argv)
    device = choose_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    found = {"machine": machine(), "device": str(device), "calls": calls(device)}
    print(json.dumps(found, indent=2) if args.json else in_lines(found))
    return 0


def machine() -> dict[str, Any]:
    """Versions, None where something is missing, and the GPUs."""
    from leetdist.kernels.runtime import nvrtc, triton_release

    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "leetdist": leetdist.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton_release.version(),
        "CUDA of torch": torch.version.cuda,
        "NVRTC": ".".join(map(str, nvrtc.version() or ())) or None,
        "cuda-core": _installed("cuda-core"),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version()))
        if cuda and torch.distributed.is_nccl_available()
        else None,
        "GPUs": [_gpu(number) for number in range(torch.cuda.device_count())] if cuda else [],
    }
    found |= {name: _installed(name) for name in PACKAGES}
    given = settings()
    found["settings"] = {"LEETDIST_BACKEND": given.backend, "LEETDIST_HOPPER": given.hopper}
    return found


def calls(device: torch.device) -> list[dict[str, Any]]:
    """What will run for each of the typical calls."""
    rows = []
    for name, dtype, dim in CALLS:
        try:
            problem = _problem(dtype, dim, TOKENS, device)
            used = kernels_for(problem, TOKENS).used
            rows.append({"call": name, "method": method_for(problem, TOKENS).method, **_ran(used)})
        except ValueError as error:  # a setting leaves none
            rows.append({"call": name, "error": str(error)})
    for step in ("step", "steps"):
        name = f"bf16, heads of 128, linear_attention_{step}"
        try:
            rows.append({"call": name, **_ran([decoder(step, _problem(torch.bfloat16, 128, 1, device))])})
        except ValueError as error:
            rows.append({"call": name, "error": str(error)})
    return rows


def in_lines(found: dict[str, Any]) -> str:
    lines = ["this machine"]
    for name, value in found["machine"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={x}" for key, x in value.items())
        shown = ", ".join(value) if isinstance(value, list) else value
        lines.append(f"  {name:<14} {shown or 'none'}")
    lines.append(f"\nwhat will run on {found['device']} ({HEADS} heads, {TOKENS:,} tokens, forward)")
    for row in found["calls"]:
        lines.append(f"\n  {row['call']}" + (f": method {row['method']}" if "method" in row else ""))
        if "error" in row:
            lines.append(f"    {row['error']}")
            continue
        for kernel in row["kernels"]:
            more = f": {kernel['configuration']}" if kernel["configuration"] else ""
            lines.append(f"    {kernel['steps']} by {kernel['name']} ({kernel['module']}){more}")
        for other in row["refused"]:
            lines.append(f"      not {other['name']} ({other['module']}): {other['reason']}")
        for command in row["install"]:
            lines.append(f"    for a faster one: {command}")
    return "\n".join(lines)


def _problem(dtype: torch.dtype, dim: int, tokens: int, device: torch.device) -> Problem:
    x = torch.empty(1, 1, 1, dim, dtype=dtype, device=device).expand(1, HEADS, tokens, dim)
    with torch.no_grad():
        return describe(
            x, x, x, None,
            scale=1.0, initial_state=None, return_state=False, cu_seqlens=None, method="auto", tile=None,
        )  # fmt: skip


def _ran(used: Iterable[Choice]) -> dict[str, Any]:
    used = list(used)
    refused = refusals(used)
    commands = (re.search(r"\((pip install .*)\)", row["reason"]) for row in refused)
    install = list(dict.fromkeys(found[1] for found in commands if found))
    return {"kernels": in_words(used), "refused": refused, "install": install}


def _gpu(number: int) -> str:
    given = torch.cuda.get_device_properties(number)
    return f"{given.name} (sm_{given.major}{given.minor}, {given.total_memory / 2**30:.0f} GiB)"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
