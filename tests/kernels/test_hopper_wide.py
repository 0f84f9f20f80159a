"""The wide Hopper kernels: they compile ahead of time as they were designed, and on a Hopper GPU they are right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import assert_leaves_out_the_last
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as exact
from leetdist.kernels.constant_decay.triton.configs import parts_of
from leetdist.reference import relative_error

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
triton_block = pytest.importorskip("leetdist.kernels.constant_decay.triton.block")

from compiling import SPILLS, assembled, spilled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from leetdist.kernels.constant_decay.triton import hopper_wide as wide  # noqa: E402

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SHARED_MEMORY = 227 * 1024
POINTERS = {"states": "*fp32", "log_decay": "*fp32", "onto": "*fp32", "table": "*i64", "again": "*i32"}
STRIDES = ("_batch", "_head", "_token", "_tile", "_row")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def compiled(
    kernel: Any,
    dtype: torch.dtype,
    precision: str | None,
    rows: int,
    columns: int,
    *,
    reverse: bool,
    regular: bool,
    again: bool = False,
    onto: bool = False,
) -> Any:
    parts, name = parts_of(dtype, precision), NAMES[dtype]
    held_rows, held_columns, warps = wide.block(rows, columns, parts)
    constants = {
        "REGULAR": regular, "REVERSE": reverse, "CHUNK": wide.CHUNK, "ROWS": held_rows, "COLUMNS": held_columns,
        "PARTS": parts.inputs, "STATE_PARTS": parts.state, "SCORE_PARTS": parts.scores,
        "WEIGHTED_PARTS": parts.weighted, "STAGES": wide.STAGES, "AGAIN": again, "num_warps": warps, "state_column": 1,
    }  # fmt: skip
    if regular:
        constants["table"] = None
    if not onto:
        constants["onto"] = None
    signature, values, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(place,)] = "constexpr", constants[argument]
        elif argument in ("a", "b", "c"):
            block = [1, 1, wide.CHUNK, held_columns if argument == "c" else held_rows]
            layout = gl.NVMMASharedLayout.get_default_for(block, wide.ELEMENTS[dtype])
            signature[argument] = f"tensordesc<{name}{block},{layout!r}>"
        else:
            out = f"*{name}" if kernel is wide.tile_outputs_kernel else "*fp32"
            number = "fp32" if argument.endswith("scale") else "i32"
            signature[argument] = out if argument == "out" else POINTERS.get(argument, number)
            if signature[argument][0] == "*" or argument.endswith((*STRIDES, "rows", "columns")):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    ("dtype", "precision", "rows", "columns", "reverse", "onto"),
    [
        (FP32, None, 128, 128, True, False),
        (FP32, None, 128, 128, True, True),
        (FP32, None, 64, 64, False, False),
        (FP32, "tf32", 128, 128, False, False),
        (BF16, None, 256, 256, True, False),
        (FP16, None, 256, 256, False, False),
        (BF16, "high", 256, 256, False, True),
    ],
)
def test_compiles_and_fits(
    dtype: torch.dtype,
    precision: str | None,
    rows: int,
    columns: int,
    reverse: bool,
    onto: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs = wide.tile_outputs_kernel
    for kernel, again in ((wide.tile_states_kernel, False), (outputs, False), (outputs, True)):

        def build(kernel: Any = kernel, again: bool = again) -> Any:
            options = {"reverse": reverse, "regular": not reverse, "again": again, "onto": onto}
            return compiled(kernel, dtype, precision, rows, columns, **options)

        result, said = assembled(build, tmp_path, monkeypatch, capsys)
        assert result.metadata.shared <= SHARED_MEMORY
        assert "wgmma" in result.asm["ptx"]
        assert "serialized" not in said, said
        assert again or spilled(said) <= SPILLS, said


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("tiles", [Tiles(512, (0, 1300)), Tiles(128, (0, 128, 300, 300, 301, 905))], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision", "rows", "columns", "bound"),
    [
        (FP32, None, 128, 128, 1e-6),
        (FP32, None, 64, 64, 1e-6),
        (FP32, None, 40, 200, 1e-6),
        (FP32, "tf32", 128, 128, 1e-3),
        (BF16, None, 256, 256, 3e-3),
        (FP16, None, 256, 128, 6e-4),
        (BF16, "high", 128, 128, 1.9e-3),
        (BF16, "high", 256, 256, 1.9e-3),
        (FP16, "high", 64, 64, 2.4e-4),
        (BF16, None, 72, 40, 3e-3),
    ],
)
def test_against_fp64(
    dtype: torch.dtype,
    precision: str | None,
    rows: int,
    columns: int,
    bound: float,
    reverse: bool,
    tiles: Tiles,
) -> None:
    kernels = SimpleNamespace(tile_states=wide.tile_states, tile_outputs=wide.tile_outputs, fold=triton_block.fold)

    def draw(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(2, tiles.num_tokens, heads, dim, device="cuda").to(dtype).transpose(1, 2)

    a, b, c = draw(4, rows), draw(2, rows), draw(2, columns)
    log_decay = torch.tensor([0.0, -0.01, -0.5, -5.0], device="cuda")
    # A state beyond fp16's range, which the kernels must hold all the same.
    states = 1e6 * torch.randn(2, 4, tiles.count, rows, columns, device="cuda")
    options: dict[str, Any] = {"reverse": reverse, "scale": 1e-6, "state_scale": 1e-6}
    out = kernels.tile_outputs(a, b, c, states, log_decay, tiles, out_dtype=dtype, precision=precision, **options)
    expected = exact.tile_outputs(
        a.double(), b.double(), c.double(), states.double(), log_decay, tiles, out_dtype=torch.float64, **options
    )
    added = kernels.tile_states(b, c, log_decay, tiles, reverse=reverse, scale=0.3, precision=precision)
    expected_added = exact.tile_states(b.double(), c.double(), log_decay, tiles, reverse=reverse, scale=0.3)
    assert_leaves_out_the_last(kernels, b, c, log_decay, tiles, reverse=reverse, precision=precision)
    for head in range(4):
        assert relative_error(out[:, head], expected[:, head]) < bound
        assert relative_error(added[:, head], expected_added[:, head]) < bound
