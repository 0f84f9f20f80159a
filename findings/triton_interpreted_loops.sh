#!/usr/bin/env bash
# One would guess: Triton 3.6, which names no newest numpy, runs interpreted with any numpy that pip brings beside it.
# It is so that: a loop whose bound is a value of the kernel's (`range(tl.load(n))`) ends in a TypeError with numpy 2.4,
# which no longer takes an array of one element for an index; with numpy 2.3 the same kernel runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 triton==3.6.0
cat >"$folder/loops.py" <<'PY'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(n, out):
    total = 0
    for i in range(tl.load(n)):
        total += i
    tl.store(out, total)


n, out = torch.tensor([5], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
try:
    kernel[(1,)](n, out)
    said = f"sum {out.item()}"
except Exception as error:
    while error.__cause__ is not None:
        error = error.__cause__
    said = f"{type(error).__name__}: {error}"
print(f"torch {torch.__version__}, triton {triton.__version__}, numpy {numpy.__version__}: {said}")
PY
seen() { TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/loops.py"; }
"${pip[@]}" numpy==2.3.5
before=$(seen)
"${pip[@]}" numpy==2.4.6
after=$(seen)
printf '%s\n%s\n' "$before" "$after"
[[ $before == *": sum 10" && $after == *": TypeError: "* ]]
