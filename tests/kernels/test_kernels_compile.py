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

from leetdist.kernels.common import head_sums, hop  # noqa: E402
from leetdist.kernels.constant_decay.triton import block, decay, fleet, fold, open_chunk, step  # noqa: E402
from leetdist.kernels.constant_decay.triton.configs import block_config, padded, parts_of  # noqa: E402
from leetdist.kernels.runtime import triton_release  # noqa: E402
from leetdist.kernels.runtime.settings import OF_TRITON  # noqa: E402
from leetdist.kernels.token_decay.triton import added_up, by_head, gradient, gradient_kernels, sums  # noqa: E402

# Shared memory that one program may use, bytes: the CUDA programming guide's table of compute capabilities.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TILE = 1024


def compiled(kernel, architecture: int, warps: int, stages: int, dtype: torch.dtype, **constants):
    """Compile a kernel: `*_dtype` arguments are pointers to inputs, counts and strides are 64-bit."""
    doubles = kernel in (decay._decay_gradient, by_head._of_tiles, head_sums._joined)
    out = NAMES[dtype] if kernel is block._tile_outputs else "*fp64" if doubles else "*fp32"
    pointers = {"out": out, "table": "*i64"}
    pointers |= {"states": "*fp32", "state_grads": "*fp32", "initial": "*fp32", "final": "*fp32", "log_decay": "*fp32"}
    pointers |= {"onto": "*fp32", "state": "*fp32", "new": "*fp32", "decays": "*fp32", "ends": "*fp32"}
    pointers |= {"own": "*fp64", "theirs": "*fp64", "shares": "*fp64", "total": "*fp64"}
    pointers |= {"read": "*fp32", "written": "*fp32", "across": "*fp32", "only": "*i32"}
    pointers |= dict.fromkeys(("full", "free", "full_there"), "*i32") | {"source": "*fp32", "target": "*fp32"}
    pointers |= {"read": "*i32"} if kernel is fold._fold else {}
    pointers |= {"x": "*fp32", "early_lost": "*i32", "late_lost": "*i32", "lost": "*i32", "weight": "*fp32"}
    pointers |= {
        "kept": NAMES[torch.float16 if dtype == torch.float32 else dtype],
        "units": "*fp32",
        "sums": "*fp64" if kernel is head_sums._add_up else "*fp32",
        "keep": "*fp32",
    }
    signature, values = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name == "onto" and not constants["REVERSE"]:
            signature[name], values[name] = "constexpr", None
        elif name in pointers:
            signature[name] = pointers[name]
        elif name in ("a", "b", "c", "q", "k", "v", "do", "o"):
            signature[name] = NAMES[dtype]
        elif name in ("segments", "where"):
            signature[name] = "*i64"
        else:
            number = name.endswith("scale") or name.startswith(("rank", "other"))
            signature[name] = "fp32" if number else "i64"
    source = ASTSource(kernel, signature, constexprs=values)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": kernel is not step._step or step.FUSION}
    return triton.compile(source, target=target, options=options)


# Compiling takes seconds: the usual size in both directions, the largest where operands are widest, a small one. All of
# them where there is least shared memory; a chip's own instructions are in the usual, the small and fp32's.
SHAPES = [
    (torch.bfloat16, 128, 128, True, SHARED_MEMORY),
    (torch.bfloat16, 64, 16, False, SHARED_MEMORY),
    (torch.float32, 256, 256, True, SHARED_MEMORY),
    (torch.bfloat16, 128, 128, False, (80,)),
    (torch.float16, 256, 256, False, (80,)),
]


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "reverse", "architecture"),
    [(*shape, architecture) for *shape, architectures in SHAPES for architecture in architectures],
    ids=str,
)
def test_block_kernels_compile_and_fit(dtype, rows, columns, reverse, architecture) -> None:
    fits(architecture, dtype, rows, columns, reverse=reverse, by_token=False)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_kernels_of_a_decay_a_token_compile_and_fit(architecture: int) -> None:
    fits(architecture, torch.bfloat16, 128, 64, reverse=True, by_token=True)  # Mamba-2's


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_an_open_tile_compiles_and_fits(architecture: int) -> None:
    dtype = torch.bfloat16 if architecture == 90 else torch.float32
    parts = parts_of(dtype, None)
    for own, by_token in ((False, False), (True, architecture == 90)):
        config = block_config(128, 128, dtype, TILE, None if own else parts)
        constants = {"OWN": own, "CHUNK": config.chunk, "COLUMNS": config.columns, "BY_TOKEN": by_token}
        constants["ROWS"] = block.states_block(128, config) if own else padded(128)
        constants |= {"PARTS": parts.inputs, "WEIGHTED_PARTS": parts.weighted}
        result = compiled(open_chunk._advance, architecture, config.warps, config.stages, dtype, **constants)
        assert result.metadata.shared <= SHARED_MEMORY[architecture]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_gradient_of_a_decay_a_token_fits_where_it_is_widest(architecture: int) -> None:
    for kernel, warps, stages, constants in of_gradient(256, 256, torch.float32):
        result = compiled(kernel, architecture, warps, stages, torch.float32, REGULAR=True, **constants)
        assert result.metadata.shared <= SHARED_MEMORY[architecture]


def of_gradient(rows: int, columns: int, dtype: torch.dtype):
    """The kernels of d log_decay token by token, their warps, stages and constants."""
    found = gradient.gradient_config(rows, columns, dtype, TILE)
    constants = {"CHUNK": found.chunk, "ROWS": padded(rows), "COLUMNS": found.columns}
    constants["PARTS"] = 2 if dtype == torch.float32 else 1
    inside = gradient.inside_warps(found, rows, dtype), 1, {**constants, "FIRST": True}
    walk = found.warps, found.stages, constants
    return [
        (gradient_kernels.keep_states_kernel, *walk),
        (gradient_kernels.add_inside_kernel, *inside),
        (gradient_kernels.add_behind_kernel, *walk),
    ]


def fits(architecture: int, dtype: torch.dtype, rows: int, columns: int, *, reverse: bool, by_token: bool) -> None:
    """The kernels of both passes for a state of rows x columns."""
    parts = parts_of(dtype, "high")  # the most that 16-bit dtypes take
    config, outputs = block_config(rows, columns, dtype, TILE), block_config(rows, columns, dtype, TILE, parts)
    common = {"REGULAR": True, "CHUNK": config.chunk}
    directed = {"REVERSE": reverse, "BY_TOKEN": by_token, "PARTS": parts.inputs, "WEIGHTED_PARTS": parts.weighted}
    states = {"ROWS": block.states_block(rows, config), "COLUMNS": config.columns, **directed}
    of_outputs = {"ROWS": padded(rows), "COLUMNS": outputs.columns, **directed}
    kernels = [
        (block._tile_states, config.warps, config.stages, states),
        (
            block._tile_outputs, outputs.warps, outputs.stages,
            {**of_outputs, "STATE_PARTS": parts.state, "SCORE_PARTS": parts.scores},
        ),
    ]  # fmt: skip
    if by_token and architecture == 80:  # for the others in fp32 and at its widest, above
        kernels += of_gradient(rows, columns, dtype)
    elif not by_token:
        constants = {"ROWS": padded(rows), "COLUMNS": decay.slope_columns(config)}
        constants["DOUBLE"] = dtype == torch.float32 and architecture < 100
        kernels.append((decay._decay_gradient, config.warps, 1, constants))
    for kernel, warps, stages, constants in kernels:
        result = compiled(kernel, architecture, warps, stages, dtype, **(common | constants))
        name = f"{kernel.__name__} {rows}x{columns} sm_{architecture} {dtype}"
        assert result.metadata.shared <= SHARED_MEMORY[architecture], name
        print(name, "shared", result.metadata.shared, "bytes")


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_fold_compiles(architecture: int) -> None:
    constants = {"REGULAR": False, "REVERSE": True, "HAS_INITIAL": True, "TOGETHER": 16, "TIMED": True}
    for by_token, arrives, leaves in ((False, False, False), (True, True, False), (False, True, True)):
        ways = {"ARRIVES": arrives, "LEAVES": leaves, "BY_TOKEN": by_token}
        none = dict.fromkeys(("full", "read") * (not arrives) + ("full_there", "free") * (not leaves))
        compiled(fold._fold, architecture, 4, 1, torch.float32, **constants, **ways, **none, BLOCK=hop.LEAST)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_hops_compile(architecture: int) -> None:
    put = {"GROUP": 8, "BLOCK": hop.BLOCK}
    for kernel, constants in ((hop._put, put), (hop._wait, {"FLAGS": hop.PIECES}), (hop._look, {})):
        compiled(kernel, architecture, 8, 1, torch.float32, **constants, TIMED=True)
    compiled(hop._release, architecture, 8, 1, torch.float32, FLAGS=hop.PIECES)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_sums_compile(architecture: int) -> None:
    constants = {"REGULAR": False, "ROWS": 16, "ANCHOR_": 64}
    for others in ((), ("only",)):
        compiled(sums._token_sums, architecture, 4, 1, torch.float32, **constants, **dict.fromkeys(others))
    for size in (sums.LEAST_BLOCK, sums.MOST_BLOCK):
        compiled(sums._transitions, architecture, size // 512, 1, torch.float32, REGULAR=True, BLOCK=size)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_gradients_of_heads_compile(architecture: int) -> None:
    for kernel in (head_sums._joined, head_sums._add_up):
        compiled(kernel, architecture, 4, 1, torch.float32, BLOCK_=head_sums.BLOCK)
    compiled(decay._sum_blocks, architecture, 4, 1, torch.float32, BLOCKS=4, PART_=decay.PART)


def test_what_hopper_leaves_of_a_gradient_compiles() -> None:
    config = gradient.gradient_config(128, 128, torch.bfloat16, TILE)
    for read in (1, 2):
        constants = {"REGULAR": False, "CHUNKS": added_up.CHUNKS, "READ": read}
        compiled(added_up._add_up, 90, 4, 1, torch.float32, **constants)
    for kernel, constants in ((by_head._of_tokens, {}), (by_head._of_tiles, {"REGULAR": False})):
        compiled(kernel, 90, 4, 1, torch.float32, **constants, BLOCK_=by_head.BLOCK)
    constants = {"REGULAR": True, "CHUNK_": config.chunk, "ROWS": 128, "COLUMNS": 128, "FLAGS": added_up.FLAGS}
    result = compiled(added_up._walk_again, 90, config.warps, config.stages, torch.bfloat16, **constants)
    assert result.metadata.shared <= SHARED_MEMORY[90]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_step_compiles(architecture: int) -> None:
    for rows, by_token in ((128, False), (128, True), (1024, False)):
        constants = {"ROWS": rows, "COLUMNS": step.held_columns(rows, 128), "BY_TOKEN": by_token}
        compiled(step._step, architecture, step.WARPS, 1, torch.bfloat16, **constants)


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
            constants |= {"PARTS": 1, "WEIGHTED_PARTS": 1, "BY_TOKEN": False}
            asm = compiled(block._tile_states, 80, 4, 1, torch.bfloat16, **constants).asm
            return asm["ptx"], asm["cubin"]

    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    for name in OF_TRITON:
        monkeypatch.delenv(name, raising=False)
    ptx, cubin = code()
    assert "fma.rn" in ptx
    assert code(DISABLE_PTXAS_OPT="1")[1] != cubin
    assert code(TRITON_DEFAULT_FP_FUSION="0") == (ptx, cubin)
    if triton_release.number() >= (3, 9):
        assert "fma.rn" not in code(TRITON_FORCE_DISABLE_FP_FUSION="1")[0]
