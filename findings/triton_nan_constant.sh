#!/usr/bin/env bash
# One would guess: a constant of a kernel's module may be any number, NaN among them, as float("nan") in the kernel may.
# It is so that: a kernel that reads a global NaN compiles and is never launched. Triton compares the globals that it was
# compiled with against what they are now, before each launch and the first, and a NaN is never equal to itself:
# RuntimeError "Global variable NAN has changed since we compiled this kernel, from constexpr[nan] to constexpr[nan]".
# float("nan") written out in the kernel is not compared. Compiling ahead of time, and the interpreter, show nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.3.5
cat >"$folder/constant.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

NAN = tl.constexpr(float("nan"))


@triton.jit
def from_global(out):
    tl.store(out, NAN)


@triton.jit
def written_out(out):
    tl.store(out, float("nan"))


class NoDevice:
    """Enough of a driver to compile for an H100 where there is none; `warmup` launches nothing."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


triton.runtime.driver.set_active(NoDevice())


def launchable(kernel):
    try:
        kernel.warmup(torch.float32, grid=(1,))
        return "as it should"
    except RuntimeError as error:
        return f"RuntimeError: {error}"


found = launchable(from_global), launchable(written_out)
print(f"Triton {triton.__version__}: from a global: {found[0]}; written out: {found[1]}")
sys.exit("has changed" not in found[0] or found[1] != "as it should")
PY
for release in 3.6.0 3.9.0; do
    "${pip[@]}" --no-deps --target "$folder/$release" "triton==$release"
    PYTHONPATH=$folder/$release TRITON_CACHE_DIR=$folder/cache "$folder/venv/bin/python" -W ignore "$folder/constant.py"
done
