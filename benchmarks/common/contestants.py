"""Who competes. A contestant that is not installed, or does not serve a case, says so and is left out."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common.cases import Case
from torch import Tensor

from leetdist.reference import quadratic

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Inputs:
    """q, k: (B, N, H or fewer, Dk); v: (B, N, H or fewer, Dv); do: (B, N, H, Dv); cu_seqlens: (documents + 1,) int32.
    state: (B or documents, H, Dk, Dv) fp32 where a token is decoded, or a sequence begins with one.
    log_decay: (H,), or a decay a token, (B, H, N), and then gate, the same as (B, N, H)."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    log_decay: Tensor
    scale: float
    state: Tensor | None
    gate: Tensor | None = None
    cu_seqlens: Tensor | None = None


class Contestant:
    """One implementation. Subclasses say what they need and compute `forward` in (B, N, H, D)."""

    name = ""
    module = "torch"  # what must be installed
    devices: tuple[str, ...] = ("cuda",)
    passes: tuple[str, ...] = ("forward", "forward + backward")
    operator = "decaying linear attention"
    compiles = True  # at first use
    by_length = False  # and again for every number of tokens
    gate = "gate"  # the one of Inputs' decays a token that it takes
    takes: frozenset[str] = frozenset()  # of what is special about a case
    ours = False
    waits = False  # what it launches is over when `wait` returns, not when torch's stream is through with it

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if importlib.util.find_spec(self.module) else f"{self.module} is not installed"

    def serves(self, case: Case, which: str, device: str) -> bool:
        return device in self.devices and which in self.passes and case.special <= self.takes

    def active(self) -> contextlib.AbstractContextManager[None]:
        """What must hold while it runs."""
        return contextlib.nullcontext()

    def forward(self, x: Inputs) -> Tensor:
        raise NotImplementedError

    def gradients(self, x: Inputs, do: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward: dq, dk, dv; the gradient of a decay a token, (B, N, H), or of a learnt one, (H,)."""
        names = ["q", "k", "v"] + ([] if x.gate is None else [self.gate]) + ["log_decay"] * x.case.learnt
        leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
        grads = torch.autograd.grad(self.forward(replace(x, **leaves)), list(leaves.values()), do)
        return (*grads[:3], grads[3].transpose(1, 2)) if names[3:] == ["log_decay"] and x.gate is not None else grads

    def comparable(self, x: Inputs, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What `gradients` returned, as those of x."""
        return grads

    def step(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """One token: o (B, 1, H, Dv) and the new state."""
        raise NotImplementedError

    def launch(self, which: str, x: Inputs) -> None:
        """One pass, as it is timed."""
        if which == "step":
            self.step(x)
        elif which == "forward":
            with torch.no_grad():
                self.forward(x)
        else:
            self.gradients(x, x.do)

    def wait(self) -> None:
        """Until all that was launched is done."""

    def more(self, case: Case, which: str) -> tuple[int, int]:
        """Bytes beyond those of the case: that must move, and of what a call returns."""
        return 0, 0

    def reference(self, *arguments: Any) -> Tensor:
        q, k, v, log_decay, scale, rows = arguments
        return quadratic(q, k, v, log_decay, scale=scale, rows=rows)


class Ours(Contestant):
    """leetdist as it is in this tree, or in an earlier commit of it, or asked for another precision."""

    name = "leetdist"
    ours = True
    devices = ("cuda", "cpu")
    passes = ("step", "forward", "forward + backward")
    gate = "log_decay"
    takes = frozenset({"kv_heads", "documents", "learnt", "states", "compiled", "options"})

    def __init__(self, revision: str | None = None, precision: str | None = None) -> None:
        self.modules: dict[str, ModuleType] | None = None
        self.options = {} if precision is None else {"precision": precision}
        if precision is not None:
            self.name = f"leetdist {precision}"
        if revision is not None:
            self.name = f"leetdist@{revision}"
            self.modules = _load(revision)
        with self.active():
            self.package = importlib.import_module("leetdist")
        self.compiled: Any = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.modules is None:
            yield
            return
        # Two versions of one package: while the old one runs, sys.modules holds its modules.
        current = _take_out()
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            self.modules = _take_out()
            sys.modules.update(current)

    def serves(self, case: Case, which: str, device: str) -> bool:
        wanted = self.options.get("precision")
        fits = wanted is None or (case.switches and (wanted == "tf32") == (case.dtype == "fp32"))
        return super().serves(case, which, device) and fits

    def forward(self, x: Inputs) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
        call = self.package.linear_attention
        if x.case.compiled:
            call = self.compiled = self.compiled or torch.compile(call)
        options = {**self.options, **dict(x.case.options)}
        if x.cu_seqlens is not None:
            options["cu_seqlens"] = x.cu_seqlens
        if x.case.states:
            options |= {"initial_state": x.state, "return_state": True}
        o = call(q, k, v, x.log_decay, scale=x.scale, **options)
        return (o[0] if x.case.states else o).transpose(1, 2)

    def step(self, x: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
        o, state = self.package.linear_attention_step(q, k, v, x.state, x.log_decay, scale=x.scale)
        return o.transpose(1, 2), state


def _take_out() -> dict[str, ModuleType]:
    names = [n for n in sys.modules if n == "leetdist" or n.startswith("leetdist.")]
    return {name: sys.modules.pop(name) for name in names}


def _load(revision: str) -> dict[str, ModuleType]:
    """The modules of leetdist at a git revision."""
    tree = Path(tempfile.mkdtemp(prefix="leetdist-base-"))
    archive = subprocess.run(
        ["git", "archive", revision, "leetdist", "kernels", "launch"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="fully_trusted")
    current = _take_out()
    sys.path.insert(0, str(tree))
    try:
        importlib.import_module("leetdist")
        return _take_out()
    finally:
        sys.path.remove(str(tree))
        sys.modules.update(current)


class Fla(Contestant):
    """flash-linear-attention's simple_gla, with one fixed decay a head or one a token."""

    module = "fla"
    takes = frozenset({"documents", "states"})

    def __init__(self, function: str) -> None:
        self.function, self.name = function, f"fla {function}"
        if function == "fused_recurrent":
            self.passes = ("step", "forward")

    def serves(self, case: Case, which: str, device: str) -> bool:
        # A recurrence over all tokens, one after another, is the peer where fp32 accuracy is asked for.
        slow = self.function == "fused_recurrent" and case.dtype != "fp32" and which != "step"
        slow |= self.function == "fused_chunk" and case.tokens > 131072  # there, chunk is 2.5 times as fast
        fits = not slow and case.groups is None  # as many heads of q as of v
        return super().serves(case, which, device) and fits and not self._only_chunks(which)

    def _only_chunks(self, which: str) -> bool:
        return which == "step" and self.function != "fused_recurrent"

    def _call(self, x: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
        operator = getattr(importlib.import_module("fla.ops.simple_gla"), f"{self.function}_simple_gla")
        decay = {"g_gamma": x.log_decay} if x.gate is None else {"g": x.gate}
        return operator(x.q, x.k, x.v, **decay, scale=x.scale, **options)

    def forward(self, x: Inputs) -> Tensor:
        options: dict[str, Any] = {} if x.cu_seqlens is None else {"cu_seqlens": x.cu_seqlens.long()}
        if x.case.states:
            options |= {"initial_state": x.state, "output_final_state": True}
        return self._call(x, **options)[0]

    def step(self, x: Inputs) -> tuple[Tensor, Tensor]:
        return self._call(x, initial_state=x.state, output_final_state=True)


class Softmax(Contestant):
    """torch's scaled_dot_product_attention, causal: another operator, for scale."""

    name = "SDPA (softmax)"
    devices = ("cuda", "cpu")
    operator = "softmax attention"
    compiles = False

    def serves(self, case: Case, which: str, device: str) -> bool:
        limit = 32768 if device == "cuda" else 8192
        fits = case.tokens <= limit and case.dtype != "fp32" if device == "cuda" else True
        fits = fits and case.decay != "token"  # its suite has peers enough
        return super().serves(case, which, device) and fits and max(case.dk, case.dv) <= 128

    def forward(self, x: Inputs) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.scale)
        return o.transpose(1, 2)

    def reference(self, *arguments: Any) -> Tensor:
        q, k, v, _, scale, rows = arguments
        scores = (q[:, :, rows] @ k.mT) * scale
        later = torch.arange(k.shape[2], device=k.device) > rows[:, None]
        return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


class MiniMax(Contestant):
    """The attention of transformers' MiniMaxLightningAttention: its own code, its projections left out."""

    name = "transformers MiniMax"
    module = "transformers"
    devices = ("cpu",)
    compiles = False

    def __init__(self) -> None:
        self.layer: Any = None
        self.key: tuple[Any, ...] = ()

    def serves(self, case: Case, which: str, device: str) -> bool:
        # Its slopes are fixed, its loop over blocks of 256 tokens is long, its decays are fp32.
        fits = case.tokens <= 32768 and case.dk == case.dv and case.decay == "slopes"
        return super().serves(case, which, device) and fits

    def forward(self, x: Inputs) -> Tensor:
        layer = self._layer(x)
        qkv = torch.cat((x.q * x.scale, x.k, x.v), -1)
        layer.qkv_proj = lambda hidden: qkv
        out = layer(qkv.flatten(2)[..., : x.q[0, 0].numel()], None, None)[0]
        return out.unflatten(-1, (x.v.shape[2], x.v.shape[3])).to(x.q.dtype)

    def _layer(self, x: Inputs) -> Any:
        heads, dim = x.q.shape[2:]
        key = (heads, dim, x.q.device)
        if key != self.key:
            from transformers import MiniMaxConfig
            from transformers.models.minimax import modeling_minimax

            config = MiniMaxConfig(
                hidden_size=8, num_attention_heads=heads, num_key_value_heads=heads, head_dim=dim,
                num_hidden_layers=2, layer_types=["linear_attention"] * 2,
            )  # fmt: skip
            layer = modeling_minimax.MiniMaxLightningAttention(config, 0).to(x.q.device)
            slopes = -x.log_decay[:, None, None]
            layer.slope_rate = slopes
            decays = layer.decay_factors(slopes)
            layer.query_decay, layer.key_decay, layer.diagonal_decay = decays
            for name in ("act_fn", "qkv_proj", "norm", "output_gate", "out_proj"):
                delattr(layer, name)
            layer.act_fn = layer.norm = layer.out_proj = lambda y: y
            layer.output_gate = lambda hidden: hidden.new_full((), float("inf"))  # sigmoid: 1
            self.layer, self.key = layer, key
        return self.layer
