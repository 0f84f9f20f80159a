"""Every implementation of every step that kernels compute, and why each refuses what it cannot serve
(leetdist/operators/refusals.py).

`CANDIDATES` is the table: for each step, the implementations from the fastest to the one that serves all. What decides
is in `Facts`, and nothing else: leetdist.operators.dispatch takes the first that does not refuse. A new kernel is one
`Implementation` here: a module with functions that have the signatures of
leetdist.kernels.constant_decay.pytorch.block, and a `configuration(rows, columns, dtype, tile, precision)` in words.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leetdist.kernels.common.blocks import Span, blocks_of
from leetdist.operators import refusals
from leetdist.operators.facts import Facts, dotted

# Tokens that are added to a state one by one. A sum of 4,096 such terms in fp32 is off by 2e-6 where nothing decays;
# one of 512 by 6e-7, and the fold of 256 such sums by 4e-7.
ONE_BY_ONE = 512


@dataclass(frozen=True)
class Implementation:
    """One way to compute some steps. refusal: why not, in words; None: it serves.

    operator: whose steps, and where no `folder` is named, the folder of leetdist.kernels with `module`, which has a
    function a step, named in `functions` where it is not called as the step is. compiler: what makes its machine code.
    costs: the table of leetdist/operators/costs.json that was measured with it. recordable: all its launches are seen
    by leetdist.kernels.runtime.recording, so that a call can be repeated. longest_tile: tokens that it may add up one
    by one. opened: the module, beside its own, that goes on inside a tile (leetdist.operators.opened). most_rows: how
    many of the state it takes at once, where it serves any number, block by block (leetdist.kernels.common.blocks).
    weighs: its steps take the weights of v as well, and gradients are of v itself and of these.
    """

    name: str
    module: str
    refusal: Callable[[Facts], str | None]
    compiler: str = ""
    costs: str = "general"
    features: str = ""  # of the architecture that it is compiled for
    recordable: bool = False
    takes_precision: bool = False
    longest_tile: int | None = None
    functions: tuple[tuple[str, str], ...] = ()
    operator: str = "constant_decay"
    folder: str = ""
    opened: str = ""
    most_rows: Callable[[Facts], int] | None = None
    weighs: bool = False

    def blocks(self, facts: Facts) -> list[Span]:
        """The blocks of the state's rows that it takes one after the other."""
        return blocks_of(facts.rows, facts.rows if self.most_rows is None else self.most_rows(facts))

    def refuses(self, facts: Facts) -> str | None:
        return self.refusal(facts)

    def versioned(self, facts: Facts) -> str:
        """Name and version: ranks that have the same compute the same bits."""
        machine = facts.machine
        where = ""
        if machine.capability is not None:
            major, minor = machine.capability
            where = f" sm_{major}{minor}{self.features}"
        if self.compiler == "NVRTC":
            by = f" by NVRTC {dotted(machine.nvrtc)}"
        elif self.compiler == "Triton":
            where = " interpreted" if facts.interpreted else where
            by = f" by Triton {machine.triton}"
            if machine.compiled_with and not facts.interpreted:
                by += f" with {' '.join(f'{name}={value}' for name, value in machine.compiled_with)}"
        else:
            where = f" on{where}" if where else ""
            return f"{self.name} {machine.torch}{where}"
        return f"{self.name}{where}{by}"

    def function(self, step: str) -> Any:
        return getattr(self.loaded(), dict(self.functions).get(step, step))

    def loaded(self) -> Any:
        return importlib.import_module(f"leetdist.kernels.{self.folder or self.operator}.{self.module}")

    def loaded_opened(self) -> Any:
        """The module `opened`; None where there is none."""
        return importlib.import_module(f"leetdist.kernels.{self.operator}.{self.opened}") if self.opened else None

    def configuration(self, facts: Facts) -> str:
        found = getattr(self.loaded(), "configuration", None)
        if found is None:
            return ""
        return str(found(facts.rows, facts.columns, facts.dtype, facts.tile, facts.precision))


CUDA_HOPPER = Implementation(
    "CUDA C++", "cuda.grouped", refusals.cuda_hopper, "NVRTC",
    costs="sm_90", features="a", recordable=True, opened="cuda.open_chunk", most_rows=refusals.most_rows,
)  # fmt: skip
CUDA_HOPPER_HIGH = Implementation(
    "CUDA C++", "cuda.high", refusals.cuda_hopper_high, "NVRTC", costs="sm_90", features="a", recordable=True
)
GLUON_HOPPER = Implementation("Gluon", "triton.hopper", refusals.gluon_hopper, "Triton", costs="sm_90", recordable=True)
GLUON_WIDE = Implementation(
    "Gluon wide", "triton.hopper_wide", refusals.gluon_wide, "Triton",
    costs="sm_90", recordable=True, takes_precision=True, most_rows=refusals.most_rows_wide,
)  # fmt: skip
TRITON = Implementation(
    "Triton", "triton.block", refusals.triton, "Triton",
    recordable=True, takes_precision=True, opened="triton.open_chunk",
    most_rows=refusals.most_rows,
)  # fmt: skip
PYTORCH = Implementation("PyTorch", "pytorch.block", refusals.pytorch, costs="cpu", opened="pytorch.open_chunk")

CUDA_FLEET = Implementation(
    "CUDA C++", "cuda.token_scan", refusals.cuda_narrow, "NVRTC",
    recordable=True, longest_tile=ONE_BY_ONE, functions=(("fleet_outputs", "tile_outputs"),),
)  # fmt: skip
TRITON_FLEET = Implementation(
    "Triton", "triton.fleet", refusals.triton_narrow, "Triton",
    longest_tile=ONE_BY_ONE, functions=(("fleet_outputs", "tile_outputs"),),
)  # fmt: skip
PYTORCH_FLEET = Implementation(
    "PyTorch", "pytorch.fleet", refusals.pytorch, functions=(("fleet_outputs", "tile_outputs"),)
)
CUDA_BY_TOKEN = Implementation(
    "CUDA C++", "cuda.token_scan", refusals.cuda_narrow, "NVRTC",
    recordable=True, longest_tile=ONE_BY_ONE, functions=(("token_outputs", "tile_outputs_by_token"),),
)  # fmt: skip
PYTORCH_BY_TOKEN = Implementation(
    "PyTorch", "pytorch.causal_dot_product", refusals.always,
    longest_tile=ONE_BY_ONE, functions=(("token_outputs", "tile_outputs"),),
)  # fmt: skip
TRITON_STEP = Implementation("Triton", "triton.step", refusals.triton_decode, "Triton")
TRITON_STEPS = Implementation("Triton", "triton.steps", refusals.triton_decode, "Triton")
PYTORCH_DECODE = Implementation("PyTorch", "pytorch.decode", refusals.pytorch)

CUDA_HOPPER_ROWS = Implementation(
    "CUDA C++", "cuda.rows", refusals.cuda_hopper_rows, "NVRTC", features="a", recordable=True
)
CUDA_HOPPER_LEARNT = Implementation(
    "CUDA C++", "cuda.by_head", refusals.cuda_hopper_gradients, "NVRTC",
    features="a", recordable=True, folder="token_decay",
)  # fmt: skip
CUDA_HOPPER_A_TOKEN = Implementation(
    "CUDA C++", "cuda.hopper", refusals.cuda_hopper, "NVRTC",
    costs="sm_90", features="a", recordable=True, operator="token_decay", opened="cuda.open_chunk",
    most_rows=refusals.most_rows, weighs=True,
)  # fmt: skip
CUDA_HOPPER_GRADIENTS = Implementation(
    "CUDA C++", "cuda.gradients", refusals.cuda_hopper_gradients, "NVRTC",
    features="a", recordable=True, operator="token_decay",
)  # fmt: skip
CUDA_HOPPER_SHARED_GRADIENTS = Implementation(
    "CUDA C++", "cuda.shared_gradients", refusals.cuda_hopper_shared_gradients, "NVRTC",
    features="a", recordable=True, operator="token_decay", weighs=True,
)  # fmt: skip
CUDA_HOPPER_WEIGHTS = Implementation(
    "CUDA C++", "cuda.weights", refusals.cuda_hopper_weights, "NVRTC",
    features="a", recordable=True, functions=(("skipped_outputs", "weighted_values"),), operator="token_decay",
    weighs=True,
)  # fmt: skip
TRITON_A_TOKEN = Implementation(
    "Triton", "triton.block", refusals.triton, "Triton",
    recordable=True, takes_precision=True, operator="token_decay", opened="triton.open_chunk",
    most_rows=refusals.most_rows,
)  # fmt: skip
TRITON_DECODE_A_TOKEN = Implementation(
    "Triton", "triton.decode", refusals.triton_decode, "Triton", operator="token_decay"
)
PYTORCH_A_TOKEN = Implementation(
    "PyTorch", "pytorch.block", refusals.pytorch, costs="cpu", operator="token_decay", opened="pytorch.open_chunk"
)
PYTORCH_FLEET_A_TOKEN = Implementation(
    "PyTorch", "pytorch.fleet", refusals.always, functions=(("fleet_outputs", "tile_outputs"),), operator="token_decay"
)
PYTORCH_BY_TOKEN_A_TOKEN = Implementation(
    "PyTorch", "pytorch.causal_dot_product", refusals.always,
    longest_tile=ONE_BY_ONE, functions=(("token_outputs", "tile_outputs"),), operator="token_decay",
)  # fmt: skip
PYTORCH_DECODE_A_TOKEN = Implementation("PyTorch", "pytorch.decode", refusals.pytorch, operator="token_decay")


TRITON_SCAN = Implementation("Triton", "triton.scan", refusals.triton_narrow, "Triton", operator="mamba")
PYTORCH_SCAN = Implementation("PyTorch", "pytorch.scan", refusals.pytorch, operator="mamba")
TRITON_CONV = Implementation("Triton", "triton.conv", refusals.triton_taps, "Triton", operator="mamba")
PYTORCH_CONV = Implementation("PyTorch", "pytorch.conv", refusals.pytorch, operator="mamba")

# Steps of the two passes (constant_decay.pytorch.block says what each computes; the outputs of methods that go token by
# token have names of their own), of decoding, and of what Mamba-2 does around them: from the fastest to the one that
# serves all. Nobody need serve "row_outputs", which those of CUDA_HOPPER's steps are without states in memory,
# "skipped_outputs", which "scan_outputs" makes of outputs else, and "early_gradients" and "late_gradients", which make
# all gradients in two passes, where others make them one by one.
CANDIDATES: dict[str, tuple[Implementation, ...]] = {
    "transitions": (TRITON_A_TOKEN, PYTORCH_A_TOKEN),
    "tile_states": (
        CUDA_HOPPER, CUDA_HOPPER_HIGH, GLUON_HOPPER, GLUON_WIDE, TRITON, PYTORCH,
        CUDA_HOPPER_A_TOKEN, TRITON_A_TOKEN, PYTORCH_A_TOKEN,
    ),
    "tile_outputs": (
        CUDA_HOPPER, CUDA_HOPPER_HIGH, GLUON_HOPPER, GLUON_WIDE, TRITON, PYTORCH,
        CUDA_HOPPER_A_TOKEN, TRITON_A_TOKEN, PYTORCH_A_TOKEN,
    ),
    "row_outputs": (CUDA_HOPPER_ROWS,),
    "fleet_outputs": (CUDA_FLEET, TRITON_FLEET, PYTORCH_FLEET, PYTORCH_FLEET_A_TOKEN),
    "token_outputs": (CUDA_BY_TOKEN, PYTORCH_BY_TOKEN, PYTORCH_BY_TOKEN_A_TOKEN),
    "fold": (TRITON, PYTORCH, TRITON_A_TOKEN, PYTORCH_A_TOKEN),
    "weighted_values": (CUDA_HOPPER_WEIGHTS, TRITON_A_TOKEN, PYTORCH_A_TOKEN),
    "skipped_outputs": (CUDA_HOPPER_WEIGHTS,),
    "early_gradients": (CUDA_HOPPER_LEARNT, CUDA_HOPPER_GRADIENTS, CUDA_HOPPER_SHARED_GRADIENTS),
    "late_gradients": (CUDA_HOPPER_LEARNT, CUDA_HOPPER_GRADIENTS, CUDA_HOPPER_SHARED_GRADIENTS),
    "decay_gradient": (TRITON, PYTORCH, TRITON_A_TOKEN, PYTORCH_A_TOKEN),
    "step": (TRITON_STEP, PYTORCH_DECODE, TRITON_DECODE_A_TOKEN, PYTORCH_DECODE_A_TOKEN),
    "steps": (TRITON_STEPS, PYTORCH_DECODE, TRITON_DECODE_A_TOKEN, PYTORCH_DECODE_A_TOKEN),
    "scan_steps": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_inputs": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_inputs_gradient": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_steps_gradient": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_outputs": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_outputs_gradient": (TRITON_SCAN, PYTORCH_SCAN),
    "convolution": (TRITON_CONV, PYTORCH_CONV),
    "convolution_gradient": (TRITON_CONV, PYTORCH_CONV),
}  # fmt: skip
