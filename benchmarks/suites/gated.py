"""A decay a token: simple gated linear attention and Mamba-2's heads, and the peers that compute them.

The floor counts q, k, v, o (shared heads once), the decays and all their gradients once a pass.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from common.cases import Case
from common.contestants import Contestant, Inputs
from torch import Tensor

LONG = Case(1, 131072, decay="token")
MAMBA = replace(LONG, heads=64, dk=128, dv=64, groups=8)
SHORT = [replace(MAMBA, batch=16, tokens=4096), replace(MAMBA, tokens=8192)]
STEPS = [replace(case, batch=256, tokens=1, passes=("step",)) for case in (LONG, MAMBA)]

SUITE = (
    "a decay a token: 32 heads of 128, and Mamba-2's 64 heads of 64 with 8 groups of 128",
    [LONG, MAMBA, *SHORT, *(replace(case, graph=True) for case in SHORT + STEPS), *STEPS],
)


class Scan(Contestant):
    """`mamba_chunk_scan_combined`, whose C, B, dt x and dt A are q, k, v and log_decay. Inputs have the latter, so A is
    -1 and x is v / dt, which is prepared before the clock runs."""

    passes = ("forward", "forward + backward")
    chunk: int | None = None

    def __init__(self) -> None:
        self.prepared: dict[int, tuple[Inputs, Tensor, Tensor]] = {}

    def serves(self, case: Case, which: str, device: str) -> bool:
        return super().serves(case, which, device) and case.groups is not None

    def function(self) -> Any:
        return importlib.import_module(self.module).mamba_chunk_scan_combined

    def given(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """x and dt."""
        assert x.gate is not None
        if id(x) not in self.prepared:
            dt = -x.gate
            self.prepared[id(x)] = x, (x.v.float() / dt[..., None]).to(x.v.dtype), dt
        return self.prepared[id(x)][1:]

    def call(self, values: Tensor, dt: Tensor, x: Inputs, **leaves: Tensor) -> Tensor:
        b, c = leaves.get("k", x.k), leaves.get("q", x.q)
        minus = torch.full((values.shape[2],), -1.0, device=values.device)
        o: Tensor = self.function()(values, dt, minus, b, c, chunk_size=self.chunk)
        return o

    def forward(self, x: Inputs) -> Tensor:
        return self.call(*self.given(x), x)

    def gradients(self, x: Inputs, do: Tensor) -> tuple[Tensor, ...]:
        values, dt = self.given(x)
        leaves = {"q": x.q, "k": x.k, "values": values, "dt": dt}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        return torch.autograd.grad(self.call(x=x, **leaves), list(leaves.values()), do)

    def comparable(self, x: Inputs, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """dq, dk, dv: what dt gets is of v as well."""
        return *grads[:2], grads[2] / self.given(x)[1][..., None]


class OurMamba(Scan):
    name = "leetdist scan"
    devices = ("cuda", "cpu")
    module = "leetdist"

    def missing(self) -> str | None:
        there = hasattr(importlib.import_module("leetdist"), "mamba_chunk_scan_combined")
        return None if there else "leetdist has no mamba_chunk_scan_combined yet"


class MambaScan(Scan):
    """mamba_ssm's, in chunks of 256 tokens as its layers have them; decoding by its selective_state_update."""

    name = "mamba_ssm"
    module = "mamba_ssm.ops.triton.ssd_combined"
    passes = ("step", "forward", "forward + backward")
    chunk = 256

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, Tensor] = {}

    def missing(self) -> str | None:
        return why_not_imported(self.module)

    def step(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Its states are (B, H, Dv, Dk), and written in place."""
        update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
        values, dt = self.given(x)
        assert x.state is not None
        state = self.states.setdefault(id(x), x.state.mT.contiguous())
        minus = torch.full((1,), -1.0, device=dt.device).expand(state.shape[1:])
        own = dt[:, 0, :, None].expand(state.shape[:3])
        o = update(state, values[:, 0], own, minus, x.k[:, 0], x.q[:, 0])
        return o[:, None], state.mT


@cache
def why_not_imported(module: str) -> str | None:
    """In a process of its own, which extensions built for another torch may end."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module.partition('.')[0]} is not installed"
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return f"cannot be imported ({said[-1][:100]})"
    return None
