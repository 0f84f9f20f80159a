"""The operator's two passes as custom ops: what torch.compile, torch.func, forward-mode differentiation, fake and meta
tensors and dispatch modes see of a call.

An op knows its group by name and finds the transport when it runs; what the ranks must agree on is checked then, in the
forward op, and the backward op goes by the same plan (leetdist.engine.pending). The values of a log_decay on a GPU are
not read here, because that would stop the stream: they are taken as they are.

Each pass is two ops that differ in one thing. Under a group, a compiled graph may neither drop a call whose result is
not used, as the other ranks wait for it, nor reorder the calls, which Inductor does by the memory they take, and that
depends on the lengths of a rank's shard. So those ops have an effect, which keeps them, and each takes something of the
one before it, `after`, which keeps the order. (The effects' own order is lost in Inductor of PyTorch 2.13.) Calls on
one device stay free to move and to go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library
from torch._compile import _disable_dynamo
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from leetdist.engine import repeats, transforms
from leetdist.engine.checks import describe
from leetdist.engine.inputs import canonical_options, canonical_tensors
from leetdist.engine.layout import empty_as, row_major, strides_as
from leetdist.engine.passes import backward_pass, forward_pass
from leetdist.engine.pending import PendingPlans
from leetdist.engine.plan import Plan
from leetdist.engine.planning import WHAT, plan_call
from leetdist.operators.problem import state_dtype
from leetdist.sequence.agreement import told
from leetdist.sequence.group import by_name
from leetdist.sequence.shard import move

if TYPE_CHECKING:
    from leetdist.sequence.transport import Transport


@dataclass(eq=False, slots=True)
class Call:
    """One call as an op takes it, in this order; the arguments are `leetdist.linear_attention`'s, the group by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    return_state: bool
    method: str
    tile: int | None
    precision: str | None
    group: str
    around: str  # of a call of a group: `Problem`'s, a line each
    learns: bool  # of a call of a group: whether autograd records it for q, k, v or log_decay
    learns_initial: bool  # and for initial_state

    @property
    def heads(self) -> int:
        return max(self.q.shape[1], self.k.shape[1], self.v.shape[1])

    @classmethod
    def split(cls, args: tuple[Any, ...]) -> tuple[Call, tuple[Any, ...]]:
        """The call that an op's arguments begin with, and what follows it: of the backward op, four."""
        return cls(*args[:ARGUMENTS]), args[ARGUMENTS : ARGUMENTS + 4]

    def options(self) -> dict[str, Any]:
        """What `describe` takes beside q, k, v and log_decay."""
        return dict(zip(OPTIONS, (self.initial_state, self.cu_seqlens, *self.asked), strict=True))

    @property
    def given(self) -> repeats.Given:
        return self.q, self.k, self.v, self.log_decay, self.initial_state

    @property
    def asked(self) -> repeats.Options:
        return self.scale, self.return_state, self.method, self.tile, self.precision

    def repeats(self, *, again: bool = False) -> bool:
        """Whether its launches are found by its arguments. again: those of the backward pass."""
        if self.group or self.cu_seqlens is not None:
            return False
        return repeats.possible(self.given) if again else repeats.wanted(self.given, read=not self.q.is_cuda)

    def plan(self) -> Plan:
        return plan_call(
            self.q, self.k, self.v, self.log_decay, **self.options(),
            transport=by_name(self.group), read_values=not self.q.is_cuda, sees_grads=False,
            traced_grads=(self.learns, self.learns_initial),
            around=tuple([tuple(line.split("=", 1)) for line in self.around.splitlines()]),
        )  # fmt: skip

    def inputs(self, plan: Plan) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The operator's, on the grid, and the initial state, as kernels take them."""
        tensors = (self.q, self.k, self.v, self.log_decay, self.initial_state, self.cu_seqlens)
        *inputs, initial_state = canonical_tensors(*tensors, plan.highest)
        if plan.transport is not None:
            tokens = len(plan.operator.tokens)
            inputs[:tokens] = [_aligned(x, plan) for x in inputs[:tokens]]
        return tuple(inputs), initial_state

    def empty_decay(self) -> Tensor:
        return self.q.new_empty(0, dtype=torch.float32 if self.log_decay is None else self.log_decay.dtype)


ARGUMENTS = len(fields(Call))
OPTIONS = tuple(field.name for field in fields(Call)[4:-4])
SCHEMA = ", ".join(f"{str(field.type).replace(' | None', '?')} {field.name}" for field in fields(Call))
FORWARD = f"({SCHEMA}, Tensor? after=None) -> (Tensor, Tensor, Tensor)"
BACKWARD = (
    f"({SCHEMA}, Tensor states, Tensor? do, Tensor? dfinal, bool needs_decay_grad, Tensor? after=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def wanted(q: Any) -> bool:
    """Whether a call is to go through the ops: something of PyTorch's follows its operations, or there are no numbers.
    Everything else takes the shorter way (leetdist.engine.call)."""
    return transforms.followed() or without_numbers(q)


def without_numbers(q: Any) -> bool:
    """Whether q stands for a tensor, and holds nothing."""
    return isinstance(q, Tensor) and (q.is_meta or (type(q) is not Tensor and _is_fake(q)))


def shared(transport: Transport | None, q: Any) -> Transport | None:
    """What leads to the ranks that share a call; None of one whose tensors have no numbers, which this rank makes by
    itself."""
    return None if without_numbers(q) else transport


def _is_fake(x: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    options: dict[str, Any],
    group: str,
    around: tuple[tuple[str, str], ...] = (),
) -> tuple[Tensor, Tensor]:
    """As leetdist.linear_attention, with the group by name; the state is empty where it is not asked for. around: as
    `Problem`'s."""
    told_around = "\n".join([f"{name}={value}" for name, value in around])
    if torch.compiler.is_compiling():
        options = options | {"scale": float(options["scale"])}
    else:
        with told(shared(by_name(group), q), WHAT):
            options = canonical_options(**options)
            arguments = (q, k, v, log_decay, *(options[name] for name in OPTIONS), group, told_around, False, False)
            _check(Call(*arguments))
    learns = learns_initial = False
    if group and torch.is_grad_enabled():
        initial_state = options["initial_state"]
        learns = q.requires_grad or k.requires_grad or v.requires_grad
        learns = learns or (log_decay is not None and log_decay.requires_grad)
        learns_initial = initial_state is not None and initial_state.requires_grad
    op = _forward_in_order if group else _forward
    asked = (options[name] for name in OPTIONS)
    o, state, _ = op(q, k, v, log_decay, *asked, group, told_around, learns, learns_initial)
    return o, state


def _check(call: Call) -> None:
    """What can be said before any number is known."""
    options = call.options() | {"cu_seqlens": None}
    if call.cu_seqlens is not None:
        options["initial_state"] = None  # of as many rows as there are documents
    describe(call.q, call.k, call.v, call.log_decay, **options, ranks=2 if call.group else 1, read_values=False)


def _run_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, _ = Call.split(args)
    plan = None
    if call.repeats():
        o, final, states = repeats.forward(call.given, call.asked, read=not call.q.is_cuda)
    else:
        plan = call.plan()
        inputs, initial_state = call.inputs(plan)
        o, final, states = forward_pass(inputs, initial_state, plan)
        o = _aligned(o, plan, back=True)
    if states is None:  # no tile has one
        states = call.q.new_empty(0, dtype=state_dtype(call.q.dtype))
    if final is None:
        final = states.new_empty(0)
    elif call.initial_state is not None and _share_memory(final, call.initial_state):
        final = final.clone()
    # The number of tiles is not known when a graph is traced: it depends on the other ranks' tokens. A view of one
    # element has a size that is, and holds all the memory; the backward op takes the whole again.
    states = states.as_strided((1,), (1,)) if states.numel() else states.new_zeros(1)
    if plan is not None:
        _plans.keep(states, plan)
    return _laid_out(o, call.q), final, states


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, _ = Call.split(args)
    q, dv, dtype = call.q, call.v.shape[3], state_dtype(call.q.dtype)
    rows = q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    final = q.new_empty((rows, call.heads, q.shape[3], dv) if call.return_state else (0,), dtype=dtype)
    return empty_as(q, call.heads, dv, q.dtype), final, q.new_empty(1, dtype=dtype)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    call, (states, do, dfinal, needs_decay_grad) = Call.split(args)
    plan = _plans.of(states)
    if plan is None and not needs_decay_grad and call.repeats(again=True):
        dq, dk, dv, ddecay, dinitial = repeats.backward(
            call.given, states, do, dfinal, call.asked, read=not call.q.is_cuda
        )
    else:
        plan = plan or call.plan()
        inputs, _ = call.inputs(plan)
        dq, dk, dv, ddecay, dinitial = backward_pass(
            inputs, repeats.whole_states(states, plan), None if do is None else _aligned(row_major(do), plan),
            dfinal if call.return_state else None, plan, needs_gate_grads=needs_decay_grad,
        )  # fmt: skip
        dq, dk, dv = (None if x is None else _aligned(x, plan, back=True) for x in (dq, dk, dv))
        if ddecay is not None:
            ddecay = _decay_gradient(ddecay, call, plan)
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return (
        _laid_out(dq, call.q),
        _laid_out(dk, call.k),
        _laid_out(dv, call.v),
        call.empty_decay() if ddecay is None else ddecay,
        states.new_empty(0) if dinitial is None else dinitial,
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    call, (_, _, _, needs_decay_grad) = Call.split(args)
    q, k, v, initial = call.q, call.k, call.v, call.initial_state
    return (
        empty_as(q, q.shape[1], q.shape[3], q.dtype),
        empty_as(k, k.shape[1], k.shape[3], k.dtype),
        empty_as(v, v.shape[1], v.shape[3], v.dtype),
        call.empty_decay().new_empty(call.log_decay.shape if needs_decay_grad and call.log_decay is not None else 0),
        q.new_empty(0 if initial is None else initial.shape, dtype=state_dtype(q.dtype)),
    )


def _decay_gradient(grad: Tensor, call: Call, plan: Plan) -> Tensor:
    """As log_decay is: for a decay a token this rank's shard."""
    return (_aligned(grad, plan, back=True) if grad.ndim == 3 else grad).to(call.empty_decay().dtype)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _aligned(x: Tensor, plan: Plan, *, back: bool = False) -> Tensor:
    """x as the grid wants it, from the shards that the caller has, or back."""
    if plan.transport is None:
        return x
    old, new = plan.given, plan.layout.lengths
    return move(x, 2, *((new, old) if back else (old, new)), plan.transport)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides that the op's fake promises."""
    _, heads, _, dim = x.shape
    if x.stride() == strides_as(like, heads, dim):
        return x
    return empty_as(like, heads, dim, x.dtype).copy_(x)


_plans = PendingPlans()
_library = library.Library("leetdist", "DEF")


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A custom op of leetdist's: `run` computes, unseen by torch.compile, and `fake` says what shapes come out.

    PyTorch keeps compiled graphs on disk by the names of their ops: an op whose arguments change needs another name.
    """
    _library.define(f"{name}{schema}")
    _library.impl(name, _unseen(run), "CompositeExplicitAutograd")
    library.register_fake(f"leetdist::{name}", fake, lib=_library)
    return getattr(torch.ops.leetdist, name).default


def _unseen(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where torch.compile traces none of it, and autograd records nothing."""

    @wraps(run)
    def unrecorded(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return _disable_dynamo(unrecorded)


def _define_passes(name: str, *, in_order: bool) -> tuple[Any, Any]:
    forward = define(name, FORWARD, _run_forward, _fake_forward)
    backward = define(f"{name}_backward", BACKWARD, _run_backward, _fake_backward)
    runs = _unseen(_run_forward), _unseen(_run_backward)
    transforms.register(_library, forward, backward, runs, in_order=in_order)
    if in_order:
        for op in (forward, backward):
            _register_effectful_op(op, _EffectType.ORDERED)
    return forward, backward


_forward, _backward = _define_passes("decaying_attention", in_order=False)
_forward_in_order, _backward_in_order = _define_passes("sharded_decaying_attention", in_order=True)
