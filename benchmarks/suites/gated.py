"""A decay a token: simple gated linear attention and Mamba-2's heads, and the peers that compute them.

The floor counts q, k, v, o (shared heads once), the decays and all their gradients once a pass; of a scan with D and z,
also x, z and z's gradient. jla, of JAX, has kernels on a stream of its own, so that its times are the host's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from common.cases import Case
from common.contestants import Contestant, Inputs
from torch import Tensor

Given = TypeVar("Given")

LONG = Case(1, 131072, decay="token")
MAMBA = replace(LONG, heads=64, dk=128, dv=64, groups=8)
SHORT = [replace(MAMBA, batch=16, tokens=4096), replace(MAMBA, tokens=8192)]
STEPS = [replace(case, batch=256, tokens=1, passes=("step",)) for case in (LONG, MAMBA)]

SUITE = (
    "a decay a token: 32 heads of 128, and Mamba-2's 64 heads of 64 with 8 groups of 128",
    [LONG, MAMBA, *SHORT, *(replace(case, graph=True) for case in SHORT + STEPS), *STEPS],
)
BOTH = ("forward", "forward + backward")
D = 0.01  # of the scan with D and z: x is v / dt, so that D x is about as large as o


class Prepared(Generic[Given]):
    """What contestants make of their inputs before the clock runs; kept while a case lasts."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.known: dict[int, tuple[Given, Any]] = {}

    def of(self, case: Case, given: Given, make: Callable[[Given], Any]) -> Any:
        if case != self.case:
            self.case, self.known = case, {}
        if id(given) not in self.known:
            self.known[id(given)] = given, make(given)
        return self.known[id(given)][1]


class Scan(Contestant):
    """`mamba_chunk_scan_combined`, whose C, B, dt x and dt A are q, k, v and log_decay. Inputs have the latter, so A is
    -1 and x is v / dt, which is prepared before the clock runs. gated: with softplus and a bias of dt, D, and z, which
    is v."""

    passes: tuple[str, ...] = BOTH
    chunk: int | None = None

    def __init__(self, *, gated: bool = False) -> None:
        self.prepared = Prepared[Inputs]()
        self.gated = gated
        if gated:
            self.name += " with D, z"
            self.operator = "Mamba-2's scan with D and z"
            self.passes = BOTH

    def serves(self, case: Case, which: str, device: str) -> bool:
        return super().serves(case, which, device) and case.groups is not None

    def more(self, case: Case, which: str) -> tuple[int, int]:
        """x and z are read (x as v is), z's gradient is written, and z read again for it."""
        v = case.tensors()[2] if self.gated else 0
        return (v, 0) if which == "forward" else (3 * v, v)

    def given(self, x: Inputs) -> dict[str, Tensor]:
        """By name, what is not q, k and v themselves."""
        found: dict[str, Tensor] = self.prepared.of(x.case, x, self.prepare)
        return found

    def prepare(self, x: Inputs) -> dict[str, Tensor]:
        assert x.gate is not None
        dt, heads = -x.gate, x.v.shape[2]
        named = {"x": (x.v.float() / dt[..., None]).to(x.v.dtype), "dt": dt, "A": -dt.new_ones(heads)}
        if self.gated:
            named["dt"] = dt + torch.log(-torch.expm1(-dt))  # of which softplus makes dt
            named |= {"D": dt.new_full((heads,), D), "z": x.v, "dt_bias": dt.new_zeros(heads)}
        return named

    def call(self, leaves: dict[str, Tensor]) -> Tensor:
        function = importlib.import_module(self.module).mamba_chunk_scan_combined
        o: Tensor = function(**leaves, chunk_size=self.chunk, dt_softplus=self.gated)
        return o

    def forward(self, x: Inputs) -> Tensor:
        return self.call({"C": x.q, "B": x.k, **self.given(x)})

    def gradients(self, x: Inputs, do: Tensor) -> tuple[Tensor, ...]:
        named = {"C": x.q, "B": x.k, **self.given(x)}
        if not self.gated:  # as of the others
            named.pop("A")
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in named.items()}
        return torch.autograd.grad(self.call(self.given(x) | leaves), list(leaves.values()), do)

    def comparable(self, x: Inputs, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """dq, dk, dv: what dt gets is of v as well."""
        assert x.gate is not None
        return *grads[:2], grads[2] / -x.gate[..., None]

    def reference(self, *arguments: Any) -> Tensor:
        o = super().reference(*arguments)
        if not self.gated:
            return o
        _, _, v, log_decay, _, rows = arguments
        own = v[:, :, rows]
        return (o + D * own / -log_decay[:, :, rows, None]) * torch.nn.functional.silu(own.detach())


class OurMamba(Scan):
    name = "leetdist scan"
    ours = True
    devices = ("cuda", "cpu")
    module = "leetdist"


class MambaScan(Scan):
    """mamba_ssm's, in chunks of 256 tokens as its layers have them; decoding by its selective_state_update."""

    name = "mamba_ssm"
    module = "mamba_ssm.ops.triton.ssd_combined"
    passes = ("step", *BOTH)
    chunk = 256

    def __init__(self, *, gated: bool = False) -> None:
        super().__init__(gated=gated)
        self.states = Prepared[Inputs]()

    def missing(self) -> str | None:
        return why_not_imported(self.module)

    def call(self, leaves: dict[str, Tensor]) -> Tensor:
        # Else poisoned memory, which takes PyTorch's deterministic mode, means other kernels to it, tuned anew.
        importlib.import_module("mamba_ssm.utils.determinism").set_deterministic_mode(False)
        return super().call(leaves)

    def step(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Its states are (B, H, Dv, Dk), and written in place. Without dt_bias and D it fails (2.3.2)."""
        update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
        named = self.given(x)
        assert x.state is not None
        state = self.states.of(x.case, x, lambda x: x.state.mT.contiguous())
        minus = torch.full((1,), -1.0, device=state.device).expand(state.shape[1:])
        own = named["dt"][:, 0, :, None].expand(state.shape[:3])
        zero = minus.new_zeros(1).expand(state.shape[1:3])
        o = update(state, named["x"][:, 0], own, minus, x.k[:, 0], x.q[:, 0], D=zero, dt_bias=zero)
        return o[:, None], state.mT


class Jla(Contestant):
    """jax-linear-attention's simple_gla, of Pallas kernels for Hopper, in this process and on torch's memory."""

    name = "jla"
    module = "jla"
    waits = True
    by_length = True

    def __init__(self) -> None:
        self.arrays = Prepared[Tensor]()
        self.jitted: dict[tuple[str, float], Any] = {}
        self.last: Any = None

    def missing(self) -> str | None:
        return why_not_imported("jla.ops")

    def serves(self, case: Case, which: str, device: str) -> bool:
        return super().serves(case, which, device) and case.decay == "token" and not case.graph

    def array(self, x: Tensor) -> Any:
        """x as JAX has it, in the same memory."""
        torch.cuda.synchronize()
        return importlib.import_module("jax").dlpack.from_dlpack(x.detach())

    def function(self, which: str, scale: float) -> Any:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's memory is needed too
        jax, ops = importlib.import_module("jax"), importlib.import_module("jla.ops")

        def forward(q: Any, k: Any, v: Any, g: Any) -> Any:
            return ops.linear_attention("simple_gla", q, k, v, g=g, scale=scale, impl="mosaic_gpu")[0]

        def both(q: Any, k: Any, v: Any, g: Any, do: Any) -> Any:
            return jax.vjp(forward, q, k, v, g)[1](do)

        if (which, scale) not in self.jitted:
            self.jitted[which, scale] = jax.jit(forward if which == "forward" else both)
        return self.jitted[which, scale]

    def launch(self, which: str, x: Inputs, do: Tensor | None = None) -> None:
        assert x.gate is not None
        given = [x.q, x.k, x.v, x.gate] + ([] if which == "forward" else [x.do if do is None else do])
        function = self.function(which, x.scale)
        self.last = function(*(self.arrays.of(x.case, y, self.array) for y in given))

    def wait(self) -> None:
        if self.last is not None:
            importlib.import_module("jax").block_until_ready(self.last)

    def forward(self, x: Inputs) -> Tensor:
        self.launch("forward", x)
        self.wait()
        return torch.from_dlpack(self.last)

    def gradients(self, x: Inputs, do: Tensor) -> tuple[Tensor, ...]:
        self.launch("forward + backward", x, do)
        self.wait()
        return tuple(map(torch.from_dlpack, self.last))


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
