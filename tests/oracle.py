"""What results are compared with: the fp64 recurrence, within each dtype's bound, and one device, bit for bit."""

from __future__ import annotations

import itertools

import torch

import leetdist
from leetdist import reference
from leetdist.sequence.transport import Transport
from leetdist.testing.equality import Case, Difference, Tensors, compute, differences, make_tensors

# A rounding to bf16 alone is 1.7e-3; kernels that multiply in bf16 round the scores, the state and the decayed k too.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 2.7e-3}
GRADIENT_FACTOR = 2.0


def oracle(case: Case, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a case from the fp64 recurrence, document by document."""
    leaves = {name: x.double().requires_grad_() for name, x in tensors.inputs.items()}
    bounds = case.documents or (0, case.tokens)
    outputs, states = [], []
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = slice(row, row + 1) if case.documents else slice(None)
        initial = leaves["initial_state"][rows] if case.initial else None
        if begin == end:
            states.append(initial if case.initial else tensors.dstate[rows].double() * 0)
            continue
        q, k, v = (leaves[name][:, :, begin:end] for name in "qkv")
        decay = leaves.get("log_decay")
        if decay is not None and decay.ndim == 3:
            decay = decay[:, :, begin:end]
        o, state = reference.recurrence(q, k, v, decay, scale=case.scale, initial_state=initial)
        outputs.append(o)
        states.append(state)
    o, state = torch.cat(outputs, 2), torch.cat(states)
    torch.autograd.backward([o, state], [tensors.do.double(), tensors.dstate.double()])
    grads = {f"d{name}": x.grad for name, x in leaves.items()}
    return {"o": o.detach(), "state": state.detach(), **grads}


def assert_matches_oracle(case: Case, device: torch.device, seed: int) -> None:
    tensors = make_tensors(case, device, seed)
    ours, exact = compute(case, tensors, None), oracle(case, tensors)
    assert ours.keys() == exact.keys()
    # A single token's output is v times one scalar product, which is as exact as its terms, however they cancel.
    q, k = (tensors.inputs[name].double() for name in "qk")
    cancelled = 1.0 if case.tokens > 1 else float(((q * k).abs().sum(-1) / (q * k).sum(-1).abs()).max())
    for name, x in ours.items():
        bound = cancelled * BOUNDS[case.dtype] * (GRADIENT_FACTOR if name.startswith("d") else 1)
        error = reference.relative_error(x, exact[name])
        assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.2e} in {case}"


def differing(case: Case, ranks: int, device: torch.device, seed: int = 0) -> list[str]:
    """What `check` says on each of the ranks; that of one device is computed once."""
    tensors = make_tensors(case, device, seed)
    single = compute(case, tensors, None)

    def found(group: Transport) -> list[Difference]:
        return list(differences(case, group.rank, group.size, compute(case, tensors, group), single))

    return [str(difference) for result in leetdist.virtual_ranks(found, ranks) for difference in result]
