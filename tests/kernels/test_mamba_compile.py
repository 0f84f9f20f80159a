"""What Mamba-2 does around its attention compiles ahead of time, on a machine without a GPU, and spills little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if not hasattr(triton, "compile") or triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from compiling import SPILLS, assembled, spilled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from leetdist.kernels.mamba.triton import conv, scan, scan_kernels  # noqa: E402

HALF = {"x", "v", "dv", "dskip", "dx", "dy", "o", "z", "y", "dz", "before", "x_after", "dy_after", "dbefore"}
COUNTS = {"tokens", "heads", "width", "segments", "channels", "later"}
NAMES = {"documents": "*i64", "starts": "*i1", "least": "fp32", "most": "fp32"}
KERNELS: dict[Any, dict[str, Any]] = {
    scan_kernels.steps_gradient_kernel: {"SOFTPLUS": True, "TOKENS": scan.TURNED, "HEADS": scan.TURNED},
    scan_kernels.products_gradient_kernel: {"WIDE": False, "TOKENS": 32, "COLUMNS": 64, "SEGMENT_": scan.SEGMENT},
    scan_kernels.outputs_kernel: {"WIDE": False, "TOKENS": 64, "COLUMNS": 64},
    conv._convolution_gradient: {
        "W": 2, "ACTIVATED": True, "TOKENS_": conv.TOKENS_BACK, "CHANNELS_": conv.CHANNELS, "SEGMENT_": conv.SEGMENT,
    },
}  # fmt: skip


def kind(name: str) -> str:
    """Of an argument: inputs in bf16, strides and counts, and what else there is in fp32."""
    parts = name.split("_")
    if name in COUNTS or parts[-1] in ("batch", "token", "head", "column", "channel"):
        return "i32"
    return NAMES.get(name, "*bf16" if name in HALF else "*fp32")


@pytest.mark.parametrize("architecture", [80, 100])
def test_compiles_without_spills(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for kernel, constants in KERNELS.items():
        known = {name: value for name, value in constants.items() if name in kernel.arg_names}
        known |= {name: 1 for name in kernel.arg_names if name.endswith(("_column", "_channel"))}
        signature = {name: "constexpr" if name in known else kind(name) for name in kernel.arg_names}
        # As of a usual layout, which launches are compiled for: what numbers of tokens are is not known.
        aligned = [
            i
            for i, (name, x) in enumerate(signature.items())
            if x not in ("constexpr", "fp32") and name not in ("tokens", "later", "segments")
        ]
        attributes: Any = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(kernel, signature, constexprs=known, attrs=attributes)
        target = GPUTarget("cuda", architecture, 32)
        _, said = assembled(
            lambda source=source, target=target: triton.compile(source, target=target, options={"num_warps": 4}),
            tmp_path, monkeypatch, capfd,
        )  # fmt: skip
        assert spilled(said) <= SPILLS, kernel.__name__
