"""The operator under torch.compile: one graph, the same bits, on one device and over a group."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

import leetdist
from helpers import run_ranks, values
from leetdist.engine import ops
from leetdist.engine.pending import PendingPlans
from leetdist.reference import relative_error
from leetdist.sequence.virtual import VirtualGroup

pytestmark = pytest.mark.real_empty  # opcheck compares what autograd fills in


def inputs(tokens: int, *, kv_heads: int = 2, layout: bool = False, by_token: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def rows(heads: int, dim: int) -> Tensor:
        if layout:
            return torch.randn(1, tokens, heads, dim, generator=generator).transpose(1, 2)
        return torch.randn(1, heads, tokens, dim, generator=generator)

    decay = torch.tensor([-0.01, -0.2, -3.0, -200.0])
    if by_token:
        decay = decay[None, :, None] * torch.rand(1, 4, tokens, generator=generator)
    return [rows(4, 16), rows(kv_heads, 16), rows(kv_heads, 24), decay]


CASES = ["plain", "grouped, model layout", "packed", "initial and final state", "no decay"]


@pytest.mark.parametrize("case", [*CASES, "a decay a token, grouped, packed", "a decay a token, state, fewer q"])
def test_opcheck(case: str) -> None:
    q, k, v, g = inputs(
        100, kv_heads=2 if "grouped" in case else 4, layout="layout" in case, by_token="a token" in case
    )
    if "fewer q" in case:
        q = q[:, :2]
    initial, documents = None, None
    if "state" in case:
        initial = torch.randn(1, 4, 16, 24, requires_grad=True)
    if "packed" in case:
        documents = torch.tensor([0, 30, 100])
    decay = None if case == "no decay" else g.requires_grad_()
    args = [x.detach().requires_grad_() for x in (q, k, v)]
    args += [decay, initial, documents, 0.5, "state" in case, "auto", 16, None, "", "", False, False]
    library.opcheck(ops._forward, tuple(args))


def network(q: Tensor, k: Tensor, v: Tensor, g: Tensor, group: object = None) -> Tensor:
    """Two layers in flight, with something to fuse around them."""
    o = leetdist.linear_attention(torch.sin(q), k, v, g, scale=0.3, group=group)
    o, state = leetdist.linear_attention(torch.cos(q), k, o[:, : k.shape[1]], g, return_state=True, group=group)
    return (o * o).sum() + state.sum()


def gradients(function, args: list[Tensor], *more: object) -> list[Tensor]:
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in args]
    loss = function(*leaves, *more)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves)]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        # What the compiler fuses around the op may round otherwise; the op itself may not.
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("by_token", [False, True], ids=["a decay a head", "a decay a token"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_device(backend: str, by_token: bool) -> None:
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    for tokens in (100, 61):
        args = inputs(tokens, by_token=by_token)
        same(gradients(compiled, args), gradients(network, args))


def test_dynamic_length() -> None:
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (100, 130, 257):
        args = inputs(tokens)
        same(gradients(compiled, args), gradients(network, args))


def test_the_op_alone_is_equal() -> None:
    """Nothing around it to fuse: bit for bit."""
    q, k, v, g = inputs(300)
    compiled = torch.compile(leetdist.linear_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, g), leetdist.linear_attention(q, k, v, g))


def test_saved_states_are_not_to_be_copied() -> None:
    """The op's third output holds more memory than it shows; a copy of it is an error, never a wrong gradient."""
    q, k, v, g = inputs(40)
    o, final, states = ops._forward(q, k, v, g, None, None, 0.5, True, "auto", 16, None, "", "", False, False)
    assert states.shape == (1,)
    arguments = (q, k, v, g, None, None, 0.5, True, "auto", 16, None, "", "", False, False)
    assert ops._backward(*arguments, states, o, final, True)[0].shape == q.shape
    with pytest.raises(RuntimeError, match="saved for the backward was copied"):
        ops._backward(*arguments, states.clone(), o, final, True)


@pytest.mark.parametrize("layout", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_outputs_lie_as_promised(tokens: int, layout: bool) -> None:
    q = inputs(max(1, tokens), layout=layout)[0][:, :, :tokens]
    promised = ops.empty_as(q, 4, 24, torch.bfloat16)
    assert ops.strides_as(promised, 4, 24) == ops.strides_as(q, 4, 24) == promised.stride()


def test_outputs_are_the_memory_that_is_taken() -> None:
    """Nothing as large as an output is taken beside it: at 131,072 tokens that was a gibibyte."""
    q, k, v, g = inputs(2000, kv_heads=4)
    arguments = (q, k, v, g, None, None, 0.5, False, "auto", 256, None, "", "", False, False)
    o, _, states = ops._forward(*arguments)
    for op, more, outputs in ((ops._forward, (), [o]), (ops._backward, (states, o, None, False), [q, k, v])):
        with torch.profiler.profile(profile_memory=True) as profile:
            op(*arguments, *more)
        taken = Counter(event.self_cpu_memory_usage for event in profile.events())
        wanted = Counter(x.nbytes for x in outputs)
        assert {size: taken[size] for size in wanted} == wanted


def test_virtual_ranks() -> None:
    """A compiled graph knows a virtual rank by name, too."""
    for args in (inputs(128), inputs(128, by_token=True)):

        def rank(group: VirtualGroup, args: list[Tensor] = args) -> Tensor:
            compiled = torch.compile(leetdist.linear_attention, fullgraph=True, backend="eager")
            local = [leetdist.shard_sequence(x, 2, group) if x.ndim > 1 else x for x in args]
            o: Tensor = compiled(*local, group=group)
            return o

        shards = leetdist.virtual_ranks(rank, 3)
        assert torch.equal(torch.cat(shards, 2), leetdist.linear_attention(*args))


def test_ranks_agree_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward op goes by the forward's plan: to plan again is to wait for the other ranks again."""
    planned: list[str] = []
    real = ops.plan_call

    def plan_call(*args: object, **options: object) -> object:
        planned.append("")
        return real(*args, **options)

    monkeypatch.setattr(ops, "plan_call", plan_call)
    args = [x.requires_grad_() for x in inputs(128)]
    o = leetdist.linear_attention(*args)
    wanted = torch.autograd.grad(o, args, torch.ones_like(o))

    def rank(group: VirtualGroup) -> list[Tensor]:
        local = [leetdist.shard_sequence(x, 2, group) if x.ndim > 1 else x for x in args]
        leaves = [x.detach().requires_grad_() for x in local]
        more = (None, None, 1.0, False, "auto", None, None, group.name, "", True, False)
        o = ops._forward_in_order(*leaves, *more)[0]
        return list(torch.autograd.grad(o, leaves, torch.ones_like(o)))

    shards = leetdist.virtual_ranks(rank, 2)
    assert len(planned) == 2
    for place, whole in enumerate(wanted[:3]):
        assert torch.equal(torch.cat([x[place] for x in shards], 2), whole)
    assert torch.equal(sum(x[3] for x in shards), wanted[3])


def test_plans_are_kept_as_long_as_their_memory() -> None:
    call = ops.Call(*inputs(16), None, None, 1.0, False, "auto", None, None, "", "", False, False)
    plans, plan = PendingPlans(few=4), call.plan()
    held = torch.empty(3)
    plans.keep(held[:1], plan)
    for _ in range(100):
        plans.keep(torch.empty(1), plan)
        assert plans.of(held) is plan
        assert plans.of(torch.empty(1)) is None
    assert len(plans) <= 4


def over_ranks(rank: int, by_token: bool) -> None:
    args = inputs(256, by_token=by_token)
    group = dist.group.WORLD
    local = [leetdist.shard_sequence(x, 2, group).clone() if x.ndim > 1 else x for x in args]
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    same(gradients(compiled, local, group), gradients(network, local, group))

    # The surrounding group: a guard of the graph, so that entering it compiles another one.
    operator = partial(leetdist.linear_attention, tile=16)
    alone = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        outside = alone(*local)
        assert torch.equal(outside, operator(*local))
        with leetdist.sequence_parallel(group):
            inside = alone(*local)
            assert torch.equal(inside, operator(*local))
        assert torch.equal(inside, outside) == (rank == 0)

    # opcheck runs the op; all ranks do so together.
    leaves = [x.clone().requires_grad_() for x in local]
    library.opcheck(
        ops._forward_in_order, (*leaves, None, None, 1.0, True, "auto", None, None, group.group_name, "", True, False)
    )

    # Packed documents whose boundaries move tokens between the ranks.
    documents = torch.tensor([0, 70, 201, 256])
    packed = torch.compile(
        lambda *x: leetdist.linear_attention(*x, cu_seqlens=documents, group=group).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    eager = gradients(lambda *x: leetdist.linear_attention(*x, cu_seqlens=documents, group=group).square().sum(), local)
    same(gradients(packed, local), eager)

    # Checkpointing: the recomputed forward communicates again. Autocast leaves the fp32 states alone.
    def layer(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(q, k, v, g, group)

    def checkpointed(*x: Tensor) -> Tensor:
        result: Tensor = checkpoint(layer, *x, use_reentrant=False)
        return result

    same(gradients(checkpointed, local), gradients(layer, local))
    same(gradients(torch.compile(checkpointed, fullgraph=True, backend="aot_eager"), local), gradients(layer, local))


@pytest.mark.parametrize("by_token", [False, True])
def test_over_ranks(by_token: bool) -> None:
    values(run_ranks(over_ranks, 2, by_token, timeout_s=60))
