#!/usr/bin/env bash
# One would guess: a torch.autograd.Function whose backward is marked once_differentiable raises wherever somebody asks
# for its second derivative.
# It is so that: it raises in backward() alone, and there only if the incoming gradient needs one itself. With
# torch.autograd.grad(loss + penalty, x), a penalty on the first gradient adds nothing to the result, and nothing is said,
# for the error's node leads back to no tensor. What to write instead: a backward pass that is, under create_graph, a
# function of what was saved and of what comes in, with a backward of its own that raises.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/once.py" <<'PY'
import sys

import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * dy


def penalized(cube, of, way):
    """The gradient of loss + |d loss / dx|^2, in words where there is none."""
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    loss = of(cube(x)).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    try:
        total = loss + first.square().sum()
        if way == "grad":
            return torch.autograd.grad(total, x)[0].item()
        total.backward()
        return x.grad.item()
    except RuntimeError as error:
        return f"RuntimeError: {error}"


print(f"torch {torch.__version__}")
dropped = raised = 0
for name, of in (("y", lambda y: y), ("y^2", torch.square)):
    for way in ("grad", "backward"):
        marked, plain = penalized(Cube.apply, of, way), penalized(lambda x: x**3, of, way)
        print(f"loss {name}, {way}: marked {marked}, without a function of one's own {plain}")
        dropped += isinstance(marked, float) and marked != plain
        raised += isinstance(marked, str)
print(f"{dropped} of 4 dropped in silence, {raised} raised")
sys.exit((dropped, raised) != (3, 1))
PY
"$folder/venv/bin/python" -W ignore "$folder/once.py"
