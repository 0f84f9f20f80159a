#!/usr/bin/env bash
# One would guess: `torch.nn.functional.linear` of the same numbers, in the same process, on one thread, has the same bits.
# It is so that: on a CPU, where in memory the numbers lie decides too. A matrix that does not start at a multiple of 16
# bytes, as a slice of another may, or one out of a file's buffer, gives a few other last bits, with (3, 64) @ (64, 48) in
# fp32, a shape of small layers, at each such place (seen on a CPU with AVX-512). Who wants
# equal bits copies into tensors of PyTorch's own, which start on a 64-byte line, and pads rows to whole lines, so that
# the matrices of a batch start on one as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/places.py" <<'PY'
import sys

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
LINE = 16  # fp32 numbers in 64 bytes


def placed(x, behind):
    """A copy of x that starts so many numbers behind the start of a 64-byte line."""
    room = torch.empty(x.numel() + 2 * LINE)
    begin = -(room.data_ptr() // 4) % LINE + behind
    return room[begin : begin + x.numel()].view(x.shape).copy_(x)


def differing(rows, inputs, outputs):
    """The places of the input, in numbers behind a line, at which a linear layer has other bits than on the line."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    linear = torch.nn.functional.linear
    on_line = linear(placed(x, 0), placed(weight, 0))
    assert torch.equal(linear(placed(x, 0), placed(weight, 0)), on_line)  # at the same place, run to run
    return [behind for behind in range(LINE) if not torch.equal(linear(placed(x, behind), placed(weight, 0)), on_line)]


print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread")
found = {shape: differing(*shape) for shape in ((3, 64, 48), (9, 9, 8), (100, 100, 3), (64, 64, 64))}
for (rows, inputs, outputs), places in found.items():
    print(f"({rows}, {inputs}) @ ({inputs}, {outputs}): other bits at {places or 'no place'}")
sys.exit(not any(found.values()))
PY
"$folder/venv/bin/python" "$folder/places.py"
