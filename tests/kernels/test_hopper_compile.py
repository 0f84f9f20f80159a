"""The Hopper kernels compile ahead of time as they were designed: they fit, and ptxas serializes no product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from compiling import SPILLS, assembled, spilled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from leetdist.kernels.constant_decay.triton import hopper  # noqa: E402

SHARED_MEMORY = 227 * 1024
STRIDES = ("_batch", "_head", "_token", "_tile", "_row")


def descriptor(rows: int, columns: int) -> str:
    block = [1, 1, rows, columns]
    return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"


def compiled(kernel, rows: int, columns: int, *, stages: int, reverse: bool, regular: bool, again: bool = False):
    chunk, warps = hopper.chunk_and_warps(kernel.__name__.split("_")[1], rows)
    constants = {
        "REGULAR": regular, "REVERSE": reverse, "CHUNK": chunk, "ROWS": rows, "COLUMNS": columns,
        "STAGES": stages, "PART": hopper.part_of_chunk(chunk, torch.bfloat16), "AGAIN": again,
        "num_warps": warps, "state_column": 1,
    }  # fmt: skip
    types = {"a": descriptor(chunk, rows), "b": descriptor(chunk, rows), "c": descriptor(chunk, columns)}
    types |= {"states": "*fp32", "log_decay": "*fp32", "table": "*i64", "again": "*i32"}
    types["out"] = "*bf16" if kernel is hopper.tile_outputs_kernel else "*fp32"
    if regular:
        constants["table"] = None
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
            continue
        kind = "i64" if name.endswith(STRIDES) else "fp32" if name.endswith("scale") else "i32"
        signature[name] = types.get(name, kind)
        if name in ("states", "log_decay", "out") or name.endswith(STRIDES):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 64), (64, 128)])
@pytest.mark.parametrize(("reverse", "regular"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("kernel", "again"), [("tile_states_kernel", False), ("tile_outputs_kernel", False), ("tile_outputs_kernel", True)]
)
def test_compiles_and_fits(kernel, again, rows, columns, reverse, regular, tmp_path: Path, monkeypatch, capsys):
    stages = hopper.STAGES[kernel.split("_")[1], rows]
    options = {"stages": stages, "reverse": reverse, "regular": regular, "again": again}
    result, said = assembled(
        lambda: compiled(getattr(hopper, kernel), rows, columns, **options), tmp_path, monkeypatch, capsys
    )
    assert result.metadata.shared <= SHARED_MEMORY
    assert "wgmma" in result.asm["ptx"]
    assert "serialized" not in said, said
    assert "injected" not in said, said  # a wait
    assert again or spilled(said) <= SPILLS, said
