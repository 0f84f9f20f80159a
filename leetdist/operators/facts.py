"""What decides on who computes a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from leetdist.kernels.runtime.settings import Settings, compiler_settings


@dataclass(frozen=True)
class Machine:
    """A device, and what there is to compile for it. capability: of an NVIDIA GPU; triton, nvrtc: versions, None where
    missing; no_triton, no_gluon: why what is there does not do, in words (leetdist.kernels.runtime.triton_release);
    compiled_with: what the environment tells Triton (leetdist.kernels.runtime.settings)."""

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
    weighs: bool = False  # whether the kernels of the pass can take v and its weights as they are
    # Sequences, each head's for itself, as many as there would be of the longest, and its tiles; whether nothing but
    # outputs, and their gradients, is wanted of each.
    sequences: tuple[int, int] = (0, 0)
    outputs_alone: bool = False
    both_passes: bool = False  # whether gradients are wanted too

    @property
    def interpreted(self) -> bool:
        return self.machine.device == "cpu" and self.settings.backend == "triton"


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
    from leetdist.kernels.runtime import nvrtc, triton_release

    return Machine(
        device, capability, version,
        triton_release.version(), triton_release.why_not_triton(), triton_release.why_not_gluon(),
        nvrtc.version() if device == "cuda" else None, compiled_with,
    )  # fmt: skip


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if torch.version.hip is not None else torch.cuda.get_device_capability(device)


def dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version or ()))
