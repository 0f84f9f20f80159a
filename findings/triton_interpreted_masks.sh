#!/usr/bin/env bash
# One would guess: a kernel that Triton compiles, and that its interpreter ran until 3.8, runs interpreted on 3.9 too.
# It is so that: a mask whose one side is a comparison of scalars (`(offsets < n) & (step < count)`) is refused on 3.9,
# "mask has unsupported dtype": such a comparison is kept as booleans that are called integers, and becomes integers
# where it is spread over the block. `tl.where(step < count, offsets < n, False)` says the same and runs everywhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.3.5
cat >"$folder/masks.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x, out, n, step, count, WHERE: tl.constexpr):
    i = tl.arange(0, 8)
    if WHERE:
        mask = tl.where(step < count, i < n, False)
    else:
        mask = (i < n) & (step < count)
    tl.store(out + i, tl.load(x + i, mask=mask, other=0.0))


def run(where):
    out = torch.empty(8)
    try:
        kernel[(1,)](torch.ones(8), out, 5, 2, 3, WHERE=where)
        return f"sum {out.sum().item()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


found = run(False), run(True)
print(f"Triton {triton.__version__}: with &: {found[0]}; with where: {found[1]}")
refused = "unsupported dtype" in found[0]
sys.exit(refused != (sys.argv[1] == "refused") or found[1] != "sum 5.0")
PY
for release in 3.6.0:runs 3.8.0:runs 3.9.0:refused; do
    "${pip[@]}" --no-deps --target "$folder/${release%:*}" "triton==${release%:*}"
    TRITON_INTERPRET=1 PYTHONPATH=$folder/${release%:*} "$folder/venv/bin/python" -W ignore "$folder/masks.py" "${release#*:}"
done
