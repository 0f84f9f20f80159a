"""The Triton kernels compile ahead of time for every architecture served, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if not hasattr(triton, "compile") or triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from leetdist.kernels.common import release  # noqa: E402
from leetdist.kernels.common.settings import OF_TRITON  # noqa: E402
from leetdist.kernels.constant_decay.triton import block, decay, fleet, fold, step  # noqa: E402
from leetdist.kernels.constant_decay.triton.configs import block_config, padded, parts_of  # noqa: E402

# Shared memory that one program may use, bytes: the CUDA programming guide's table of compute capabilities.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TILE = 1024


def compiled(kernel, architecture: int, warps: int, stages: int, dtype: torch.dtype, **constants):
    """Compile a kernel: `*_dtype` arguments are pointers to inputs, counts and strides are 64-bit."""
    pointers = {"out": NAMES[dtype] if kernel is block._tile_outputs else "*fp32", "table": "*i64"}
    pointers |= {"states": "*fp32", "state_grads": "*fp32", "initial": "*fp32", "final": "*fp32", "log_decay": "*fp32"}
    pointers |= {"state": "*fp32", "new": "*fp32", "decays": "*fp32"}
    signature, values = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in pointers:
            signature[name] = pointers[name]
        elif name in ("a", "b", "c", "q", "k", "v", "do", "o"):
            signature[name] = NAMES[dtype]
        elif name == "segments":
            signature[name] = "*i64"
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i64"
    source = ASTSource(kernel, signature, constexprs=values)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": kernel is not step._step or step.FUSION}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", NAMES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_block_kernels_compile_and_fit(architecture: int, dtype: torch.dtype) -> None:
    parts = parts_of(dtype, "high")  # the most that 16-bit dtypes take
    # Compiling takes seconds: the usual size in both directions, the largest where operands are widest, a small one.
    shapes = {
        torch.bfloat16: [(128, 128, False), (128, 128, True), (64, 16, False)],
        torch.float16: [(256, 256, False)],
        torch.float32: [(256, 256, True)],
    }
    for rows, columns, reverse in shapes[dtype]:
        config, outputs = block_config(rows, columns, dtype, TILE), block_config(rows, columns, dtype, TILE, parts)
        common = {"REGULAR": True, "CHUNK": config.chunk}
        kernels = [
            (block._tile_states, config.stages, block.states_block(rows, config), config.columns),
            (block._tile_outputs, outputs.stages, padded(rows), outputs.columns),
            (decay._decay_gradient, 1, padded(rows), decay.slope_columns(config)),
        ]
        for kernel, stages, block_rows, block_columns in kernels:
            constants = common | {"ROWS": block_rows, "COLUMNS": block_columns}
            if kernel is decay._decay_gradient:
                constants["PRECISION"] = "ieee" if dtype == torch.float32 else "tf32"
            else:
                constants |= {"REVERSE": reverse, "PARTS": parts.inputs, "WEIGHTED_PARTS": parts.weighted}
            if kernel is block._tile_outputs:
                constants |= {"STATE_PARTS": parts.state, "SCORE_PARTS": parts.scores}
            result = compiled(kernel, architecture, config.warps, stages, dtype, **constants)
            name = f"{kernel.__name__} {rows}x{columns} sm_{architecture} {dtype}"
            assert result.metadata.shared <= SHARED_MEMORY[architecture], name
            print(name, "shared", result.metadata.shared, "bytes")


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_fold_compiles(architecture: int) -> None:
    constants = {"REGULAR": False, "REVERSE": True, "HAS_INITIAL": True, "BLOCK": fold.FOLD_BLOCK}
    compiled(fold._fold, architecture, 4, 1, torch.float32, **constants)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_step_compiles(architecture: int) -> None:
    compiled(step._step, architecture, step.WARPS, 1, torch.bfloat16, ROWS=128, COLUMNS=step.COLUMNS)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_fleet_compiles(architecture: int) -> None:
    for rows, held in ((128, 32), (256, 16)):
        constants = {"REGULAR": True, "REVERSE": False, "ROWS": rows, "COLUMNS": held}
        compiled(fleet._fleet_outputs, architecture, 1, 1, torch.float32, **constants)


def test_triton_compiles_by_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why ranks compare these variables: the same source gets other instructions, and where nothing is fused, other
    roundings. And why not TRITON_DEFAULT_FP_FUSION: a launch that says what it wants has it."""

    def code(**variables: str) -> tuple[str, bytes]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.knobs.cache, "dir", str(tmp_path / "".join(variables)))
            for name, value in variables.items():
                patch.setenv(name, value)
            constants = {"REGULAR": True, "REVERSE": False, "CHUNK": 16, "ROWS": 16, "COLUMNS": 16}
            constants |= {"PARTS": 1, "WEIGHTED_PARTS": 1}
            asm = compiled(block._tile_states, 80, 4, 1, torch.bfloat16, **constants).asm
            return asm["ptx"], asm["cubin"]

    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    for name in OF_TRITON:
        monkeypatch.delenv(name, raising=False)
    ptx, cubin = code()
    assert "fma.rn" in ptx
    assert code(DISABLE_PTXAS_OPT="1")[1] != cubin
    assert code(TRITON_DEFAULT_FP_FUSION="0") == (ptx, cubin)
    if release.number() >= (3, 9):
        assert "fma.rn" not in code(TRITON_FORCE_DISABLE_FP_FUSION="1")[0]
