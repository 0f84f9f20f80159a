"""The decoding kernels, compiled ahead of time for Hopper: one token and several are the same operations."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if not hasattr(triton, "compile") or triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from leetdist.kernels.constant_decay.triton import step, steps  # noqa: E402


def compiled(kernel: Any, dtype: str, rows: int, columns: int, by_token: bool) -> Any:
    """As the launcher would: unit strides are constants, and pointers aligned."""
    constants = {name: 1 for name in kernel.arg_names if name.endswith(("_dim", "_column"))}
    constants |= {"ROWS": rows, "COLUMNS": columns, "BY_TOKEN": by_token}
    signature = {name: "i32" for name in kernel.arg_names}
    signature |= dict.fromkeys(("q", "k", "v", "o"), dtype) | dict.fromkeys(("index", "lengths", "ages"), "*i64")
    signature |= dict.fromkeys(("states", "state", "new", "log_decay"), "*fp32") | {"scale": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": step.WARPS, "enable_fp_fusion": step.FUSION}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def layouts_of_sums(ttgir: str) -> list[str]:
    """Where the state's numbers are when tokens are added to it, and when they are summed: the layouts themselves, for
    their names, and what indices and masks have, differ."""
    named = dict(re.findall(r"(#\w+) = (.*)", ttgir))
    used = re.findall(r"math\.fma .*, (#\w+)>|^ *}\) : \(tensor<.*?, (#\w+)>\)", ttgir, re.MULTILINE)
    assert len(used) > 1
    return [named[fma or reduced] for fma, reduced in used]


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize(("rows", "columns"), [(128, step.COLUMNS), (16, 32)])
@pytest.mark.parametrize("by_token", [False, True])
def test_one_token_and_several_are_the_same_operations(dtype: str, rows: int, columns: int, by_token: bool) -> None:
    """In the same layout and unfused (but for what says fma), they round alike: tests on a GPU compare the bits."""
    one, several = (compiled(kernel, dtype, rows, columns, by_token) for kernel in (step._step, steps._steps))
    operations = [Counter(re.findall(r"\b(fma|mul|add)(?:\.rn)?\.f32", x.asm["ptx"])) for x in (one, several)]
    layouts = [layouts_of_sums(x.asm["ttgir"]) for x in (one, several)]
    assert operations[0] == operations[1]
    # The state's own, a thread's share of them: one for k v^T, one for what of a slow decay stays.
    assert operations[0]["fma"] == 2 * rows * columns // 128
    assert layouts[0] == layouts[1]
