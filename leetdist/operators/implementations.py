"""Every implementation of every step that kernels compute, and why each refuses what it cannot serve.

`CANDIDATES` is the table: for each step, the implementations from the fastest to the one that serves all. What decides
is in `Facts`, and nothing else: leetdist.operators.dispatch takes the first that does not refuse. A new kernel is one
`Implementation` here: a module with functions that have the signatures of
leetdist.kernels.constant_decay.pytorch.block, and a `configuration(rows, columns, dtype, tile, precision)` in words.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from leetdist.kernels.common.settings import Settings, compiler_settings

LARGEST_HEAD = 256
MOST_TAPS = 4  # of a convolution
# Tokens that are added to a state one by one. A sum of 4,096 such terms in fp32 is off by 2e-6 where nothing decays;
# one of 512 by 6e-7, and the fold of 256 such sums by 4e-7.
ONE_BY_ONE = 512
# Tokens; in shorter tiles the products of the kernels for Hopper are not full.
SHORTEST_ON_HOPPER = {"narrow": 128, "wide": 64}
LONGEST_CHAIN = 4096  # tokens; what is lost from chunk to chunk (kernels/token_decay/cuda/by_head.py) adds up
# NVRTC 12.9 ends the process (signal 11, in its ptxas) when it compiles tile_outputs.cu for 16-bit outputs.
OLDEST_NVRTC = 13, 0
CUDA_EXTRA, TRITON_PACKAGE = "pip install leetdist[cuda]", "pip install -U triton"


@dataclass(frozen=True)
class Machine:
    """A device, and what there is to compile for it. capability: of an NVIDIA GPU; triton, nvrtc: versions, None where
    missing; no_triton, no_gluon: why what is there does not do, in words (leetdist.kernels.common.release);
    compiled_with: what the environment tells Triton (leetdist.kernels.common.settings)."""

    device: str
    capability: tuple[int, int] | None
    torch: str
    triton: str | None
    no_triton: str | None
    no_gluon: str | None
    nvrtc: tuple[int, int] | None
    compiled_with: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Facts:
    """What may decide on who computes a step. rows, columns: of the state as the step sees it, (Dk, Dv) or, in half of
    the backward pass, (Dv, Dk); tile: tokens."""

    machine: Machine
    settings: Settings
    dtype: torch.dtype
    rows: int
    columns: int
    tile: int
    precision: str | None = None
    operator: str = "constant_decay"
    shares: tuple[int, int, int] = (1, 1, 1)

    @property
    def interpreted(self) -> bool:
        return self.machine.device == "cpu" and self.settings.backend == "triton"


@dataclass(frozen=True)
class Implementation:
    """One way to compute some steps. refusal: why not, in words; None: it serves.

    operator: whose steps, and where no `folder` is named, the folder of leetdist.kernels with `module`, which has a
    function a step, named in `functions` where it is not called as the step is. compiler: what makes its machine code.
    costs: the table of leetdist/operators/costs.json that was measured with it. recordable: all its launches are seen
    by leetdist.kernels.common.recording, so that a call can be repeated. longest_tile: tokens that it may add up one by
    one. opened: the module, beside its own, that goes on inside a tile (leetdist.operators.opened).
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
            by = f" by NVRTC {_dotted(machine.nvrtc)}"
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


def machine_of(device: torch.device, settings: Settings) -> Machine:
    capability = _capability(device) if device.type == "cuda" else None
    compiles = device.type == "cuda" or settings.backend == "triton"
    return _machine(device.type, capability, compiles, compiler_settings() if compiles else ())


@cache
def _machine(
    device: str, capability: tuple[int, int] | None, compiles: bool, compiled_with: tuple[tuple[str, str], ...]
) -> Machine:
    """Compilers are looked for, which imports them, where there is something to compile for."""
    version = torch.__version__.partition("+")[0]
    if not compiles:
        return Machine(device, capability, version, None, None, None, None)
    from leetdist.kernels.common import loader, release

    return Machine(
        device, capability, version, release.version(), release.why_not_triton(), release.why_not_gluon(),
        loader.version() if device == "cuda" else None, compiled_with,
    )  # fmt: skip


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if torch.version.hip is not None else torch.cuda.get_device_capability(device)


def _dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version or ()))


# Why not, from the general to the particular. Each says what is there and what is wanted.


def _triton(facts: Facts) -> str | None:
    """NVIDIA GPUs from compute capability 8.0 on, in fp32, bf16 and fp16, up to 256 wide; or the interpreter."""
    machine, backend = facts.machine, facts.settings.backend
    if backend == "torch":
        return "LEETDIST_BACKEND=torch"
    if machine.device == "cpu":
        if backend != "triton":
            return "needs a GPU, this is a CPU"
        if facts.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 as integers; use float32 or float16"
    elif machine.device != "cuda" or machine.capability is None:
        return f"needs an NVIDIA GPU, this is {'ROCm' if machine.device == 'cuda' else machine.device}"
    elif machine.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {_dotted(machine.capability)}"
    if facts.dtype == torch.float64:
        return "computes float32, bfloat16 and float16, got float64"
    if max(facts.rows, facts.columns) > LARGEST_HEAD:
        return f"head sizes up to {LARGEST_HEAD}, got {max(facts.rows, facts.columns)}"
    if machine.no_triton is not None:
        return f"{machine.no_triton} ({TRITON_PACKAGE})"
    return None


def _cuda(facts: Facts) -> str | None:
    """NVRTC, and all that Triton's kernels, which compute the other steps, need."""
    if facts.settings.backend is not None:
        return f"LEETDIST_BACKEND={facts.settings.backend}"
    if facts.machine.device == "cpu":
        return "needs a GPU, this is a CPU"
    if facts.machine.nvrtc is None:
        return f"cuda-core with NVRTC is not installed ({CUDA_EXTRA})"
    return _triton(facts)


def _hopper(facts: Facts) -> str | None:
    if facts.machine.device == "cpu":
        return "needs a GPU, this is a CPU"
    if facts.machine.capability != (9, 0):
        return f"written for compute capability 9.0, this GPU has {_dotted(facts.machine.capability)}"
    return None if facts.settings.hopper else "LEETDIST_HOPPER=0"


def _hopper_16_bit(facts: Facts, sizes: set[int]) -> str | None:
    if facts.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bfloat16 and float16, got {_named(facts.dtype)}"
    if facts.precision is not None:
        return f'has no precision="{facts.precision}"'
    if not {facts.rows, facts.columns} <= sizes:
        return f"head sizes of {', '.join(map(str, sorted(sizes)))}, got {facts.rows} and {facts.columns}"
    return _long_enough(facts, SHORTEST_ON_HOPPER["narrow"])


def _long_enough(facts: Facts, least: int) -> str | None:
    return None if facts.tile >= least else f"tiles of at least {least} tokens, got {facts.tile}"


def _cuda_hopper(facts: Facts) -> str | None:
    nvrtc = facts.machine.nvrtc
    refused = _hopper(facts) or _cuda(facts)
    if refused is None and nvrtc is not None and nvrtc < OLDEST_NVRTC:
        refused = f"needs NVRTC {_dotted(OLDEST_NVRTC)}, this is {_dotted(nvrtc)} ({CUDA_EXTRA})"
    return refused or _hopper_16_bit(facts, {64, 128, 256})


def _cuda_hopper_bf16(facts: Facts) -> str | None:
    refused = _cuda_hopper(facts)
    if refused is None and facts.dtype != torch.bfloat16:
        refused = f"computes bfloat16, got {_named(facts.dtype)}"
    return refused


def _cuda_hopper_gradients(facts: Facts) -> str | None:
    refused = _cuda_hopper_bf16(facts) or _hopper_16_bit(facts, {128})
    if refused is None and facts.shares != (1, 1, 1):
        refused = "heads that share nothing"
    if refused is None and facts.operator == "constant_decay" and facts.tile > LONGEST_CHAIN:
        refused = f"tiles of up to {LONGEST_CHAIN} tokens, got {facts.tile}"
    return refused


def _cuda_hopper_shared_gradients(facts: Facts) -> str | None:
    refused = _cuda_hopper_bf16(facts)
    if refused is None and (facts.rows > 128 or facts.columns != 64):
        refused = f"head sizes of 64 or 128 and 64, got {facts.rows} and {facts.columns}"
    of_q, of_k, of_v = facts.shares
    if refused is None and (of_q % 4 or of_k % 4 or of_v > 1):
        refused = "multiples of 4 heads that share q and k, and none that share v"
    return refused


def _gluon(facts: Facts) -> str | None:
    refused = _hopper(facts) or _triton(facts)
    if refused is None and facts.machine.no_gluon is not None:
        refused = f"{facts.machine.no_gluon} ({TRITON_PACKAGE})"
    return refused


def _gluon_hopper(facts: Facts) -> str | None:
    return _gluon(facts) or _hopper_16_bit(facts, {64, 128})


def _gluon_wide(facts: Facts) -> str | None:
    refused = _gluon(facts)
    if refused is not None:
        return refused
    for size in (facts.rows, facts.columns):
        if size * facts.dtype.itemsize % 16:  # what bulk copies ask for
            return f"head sizes of a multiple of {16 // facts.dtype.itemsize} in {_named(facts.dtype)}, got {size}"
    if facts.dtype == torch.float32 and facts.rows > 128:
        return f"in float32 a state of up to 128 rows, got {facts.rows}"
    return _long_enough(facts, SHORTEST_ON_HOPPER["wide"])


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _always(facts: Facts) -> str | None:
    return None


def _pytorch(facts: Facts) -> str | None:
    """Whoever asks for Triton by name wants no other kernels in its place."""
    return "LEETDIST_BACKEND=triton" if facts.settings.backend == "triton" else None


CUDA_HOPPER = Implementation(
    "CUDA C++", "cuda.hopper", _cuda_hopper, "NVRTC",
    costs="sm_90", features="a", recordable=True, opened="cuda.open_chunk",
)  # fmt: skip
GLUON_HOPPER = Implementation("Gluon", "triton.hopper", _gluon_hopper, "Triton", costs="sm_90", recordable=True)
GLUON_WIDE = Implementation(
    "Gluon wide", "triton.hopper_wide", _gluon_wide, "Triton",
    costs="sm_90", recordable=True, takes_precision=True,
)  # fmt: skip
TRITON = Implementation(
    "Triton", "triton.block", _triton, "Triton", recordable=True, takes_precision=True, opened="triton.open_chunk"
)
PYTORCH = Implementation("PyTorch", "pytorch.block", _pytorch, costs="cpu", opened="pytorch.open_chunk")

CUDA_FLEET = Implementation(
    "CUDA C++", "cuda.token_scan", _cuda, "NVRTC",
    recordable=True, longest_tile=ONE_BY_ONE, functions=(("fleet_outputs", "tile_outputs"),),
)  # fmt: skip
TRITON_FLEET = Implementation(
    "Triton", "triton.fleet", _triton, "Triton",
    longest_tile=ONE_BY_ONE, functions=(("fleet_outputs", "tile_outputs"),),
)  # fmt: skip
PYTORCH_FLEET = Implementation("PyTorch", "pytorch.fleet", _pytorch, functions=(("fleet_outputs", "tile_outputs"),))
CUDA_BY_TOKEN = Implementation(
    "CUDA C++", "cuda.token_scan", _cuda, "NVRTC",
    recordable=True, longest_tile=ONE_BY_ONE, functions=(("token_outputs", "tile_outputs_by_token"),),
)  # fmt: skip
PYTORCH_BY_TOKEN = Implementation(
    "PyTorch", "pytorch.causal_dot_product", _always,
    longest_tile=ONE_BY_ONE, functions=(("token_outputs", "tile_outputs"),),
)  # fmt: skip
TRITON_STEP = Implementation("Triton", "triton.step", _triton, "Triton")
TRITON_STEPS = Implementation("Triton", "triton.steps", _triton, "Triton")
PYTORCH_DECODE = Implementation("PyTorch", "pytorch.decode", _pytorch)

CUDA_HOPPER_LEARNT = Implementation(
    "CUDA C++", "cuda.by_head", _cuda_hopper_gradients, "NVRTC", features="a", recordable=True, folder="token_decay"
)
CUDA_HOPPER_A_TOKEN = Implementation(
    "CUDA C++", "cuda.hopper", _cuda_hopper, "NVRTC",
    costs="sm_90", features="a", recordable=True, operator="token_decay", opened="cuda.open_chunk",
)  # fmt: skip
CUDA_HOPPER_GRADIENTS = Implementation(
    "CUDA C++", "cuda.gradients", _cuda_hopper_gradients, "NVRTC",
    features="a", recordable=True, operator="token_decay",
)  # fmt: skip
CUDA_HOPPER_SHARED_GRADIENTS = Implementation(
    "CUDA C++", "cuda.shared_gradients", _cuda_hopper_shared_gradients, "NVRTC",
    features="a", recordable=True, operator="token_decay",
)  # fmt: skip
TRITON_A_TOKEN = Implementation(
    "Triton", "triton.block", _triton, "Triton",
    recordable=True, takes_precision=True, operator="token_decay", opened="triton.open_chunk",
)  # fmt: skip
TRITON_DECODE_A_TOKEN = Implementation("Triton", "triton.decode", _triton, "Triton", operator="token_decay")
PYTORCH_A_TOKEN = Implementation(
    "PyTorch", "pytorch.block", _pytorch, costs="cpu", operator="token_decay", opened="pytorch.open_chunk"
)
PYTORCH_FLEET_A_TOKEN = Implementation(
    "PyTorch", "pytorch.fleet", _always, functions=(("fleet_outputs", "tile_outputs"),), operator="token_decay"
)
PYTORCH_BY_TOKEN_A_TOKEN = Implementation(
    "PyTorch", "pytorch.causal_dot_product", _always,
    longest_tile=ONE_BY_ONE, functions=(("token_outputs", "tile_outputs"),), operator="token_decay",
)  # fmt: skip
PYTORCH_DECODE_A_TOKEN = Implementation("PyTorch", "pytorch.decode", _pytorch, operator="token_decay")


def _triton_taps(facts: Facts) -> str | None:
    return _triton(facts) or (None if facts.columns <= MOST_TAPS else f"up to {MOST_TAPS} taps, got {facts.columns}")


TRITON_SCAN = Implementation("Triton", "triton.scan", _triton, "Triton", operator="mamba")
PYTORCH_SCAN = Implementation("PyTorch", "pytorch.scan", _pytorch, operator="mamba")
TRITON_CONV = Implementation("Triton", "triton.conv", _triton_taps, "Triton", operator="mamba")
PYTORCH_CONV = Implementation("PyTorch", "pytorch.conv", _pytorch, operator="mamba")

# Steps of the two passes (constant_decay.pytorch.block says what each computes; the outputs of methods that go token by
# token have names of their own), of decoding, and of what Mamba-2 does around them: from the fastest to the one that
# serves all. Nobody need serve "early_gradients" and "late_gradients", which make all gradients in two passes, where
# others make them one by one.
CANDIDATES: dict[str, tuple[Implementation, ...]] = {
    "transitions": (TRITON_A_TOKEN, PYTORCH_A_TOKEN),
    "tile_states": (
        CUDA_HOPPER, GLUON_HOPPER, GLUON_WIDE, TRITON, PYTORCH,
        CUDA_HOPPER_A_TOKEN, TRITON_A_TOKEN, PYTORCH_A_TOKEN,
    ),
    "tile_outputs": (
        CUDA_HOPPER, GLUON_HOPPER, GLUON_WIDE, TRITON, PYTORCH,
        CUDA_HOPPER_A_TOKEN, TRITON_A_TOKEN, PYTORCH_A_TOKEN,
    ),
    "fleet_outputs": (CUDA_FLEET, TRITON_FLEET, PYTORCH_FLEET, PYTORCH_FLEET_A_TOKEN),
    "token_outputs": (CUDA_BY_TOKEN, PYTORCH_BY_TOKEN, PYTORCH_BY_TOKEN_A_TOKEN),
    "fold": (TRITON, PYTORCH, TRITON_A_TOKEN, PYTORCH_A_TOKEN),
    "early_gradients": (CUDA_HOPPER_LEARNT, CUDA_HOPPER_GRADIENTS, CUDA_HOPPER_SHARED_GRADIENTS),
    "late_gradients": (CUDA_HOPPER_LEARNT, CUDA_HOPPER_GRADIENTS, CUDA_HOPPER_SHARED_GRADIENTS),
    "decay_gradient": (TRITON, PYTORCH, TRITON_A_TOKEN, PYTORCH_A_TOKEN),
    "step": (TRITON_STEP, PYTORCH_DECODE, TRITON_DECODE_A_TOKEN, PYTORCH_DECODE_A_TOKEN),
    "steps": (TRITON_STEPS, PYTORCH_DECODE, TRITON_DECODE_A_TOKEN, PYTORCH_DECODE_A_TOKEN),
    "scan_inputs": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_inputs_gradient": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_outputs": (TRITON_SCAN, PYTORCH_SCAN),
    "scan_outputs_gradient": (TRITON_SCAN, PYTORCH_SCAN),
    "convolution": (TRITON_CONV, PYTORCH_CONV),
    "convolution_gradient": (TRITON_CONV, PYTORCH_CONV),
}  # fmt: skip
