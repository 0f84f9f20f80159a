"""One token of decoding: the Triton kernel and the PyTorch form against the fp64 recurrence."""

from __future__ import annotations

import pytest
import torch

import leetdist
from leetdist.reference import recurrence, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(batch, heads, kv_heads, dk, dv, dtype):
    q = torch.randn(batch, heads, 1, dk, device=DEVICE).to(dtype)
    k = torch.randn(batch, kv_heads, 1, dk, device=DEVICE).to(dtype)
    v = torch.randn(batch, kv_heads, 1, dv, device=DEVICE).to(dtype)
    state = torch.randn(batch, heads, dk, dv, device=DEVICE)
    return q, k, v, state, -torch.rand(heads, device=DEVICE)


def check(q, k, v, state, log_decay):
    o, new = leetdist.linear_attention_step(q, k, v, state, log_decay, scale=0.3)
    expected, end = recurrence(q, k, v, log_decay, scale=0.3, initial_state=state)
    assert (o.dtype, new.dtype) == (q.dtype, torch.float32)
    assert relative_error(o, expected) < ROUNDING[q.dtype]
    assert relative_error(new, end) < 1e-6


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4, 2, 16, 48), (1, 2, 2, 80, 32), (1, 2, 1, 300, 70)])
def test_kernel(shape, dtype, monkeypatch):
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    check(*draw(*shape, dtype))


@pytest.mark.gpu
@pytest.mark.interpreter
def test_kernel_takes_any_strides_and_no_decay(monkeypatch):
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    q, k, v, state, _ = draw(2, 2, 2, 16, 32, torch.float32)
    state = state.mT.contiguous().mT
    q = torch.stack((q, q), -1)[..., 0]
    check(q, k, v, state, None)


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inplace_writes_over_the_state(backend, monkeypatch):
    monkeypatch.setenv("LEETDIST_BACKEND", backend)
    q, k, v, state, log_decay = draw(1, 2, 1, 16, 16, torch.float32)
    before = state.clone()
    o, new = leetdist.linear_attention_step(q, k, v, state, log_decay)
    assert torch.equal(state, before)
    o_inplace, same = leetdist.linear_attention_step(q, k, v, state, log_decay, inplace=True)
    assert same.data_ptr() == state.data_ptr()
    assert torch.equal(same, new)
    assert torch.equal(o_inplace, o)


def test_torch_form():
    check(*draw(2, 4, 2, 16, 48, torch.float32))


def test_gradients_are_those_of_the_recurrence():
    q, k, v, state, log_decay = (x.double() for x in draw(1, 2, 1, 4, 3, torch.float32))
    inputs = [x.requires_grad_() for x in (q, k, v, state, log_decay)]
    assert torch.autograd.gradcheck(leetdist.linear_attention_step, inputs)
    with pytest.raises(ValueError, match="inplace must be False"):
        leetdist.linear_attention_step(*inputs, inplace=True)


@pytest.mark.gpu
def test_a_cuda_graph_captures_it():
    q, k, v, state, log_decay = draw(2, 4, 4, 64, 64, torch.bfloat16)
    expected = leetdist.linear_attention_step(q, k, v, state, log_decay)[0]
    graph = torch.cuda.CUDAGraph()
    given = state.clone()
    with torch.cuda.graph(graph):
        o, _ = leetdist.linear_attention_step(q, k, v, state, log_decay, inplace=True)
    state.copy_(given)
    graph.replay()
    assert torch.equal(o, expected)
