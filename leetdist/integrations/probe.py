"""Which layers mix tokens, told by what they do: a model with its known layers kept from mixing is tried on parts.

A shard is right if the model, its known layers apart, gives a part of a sequence what it gives the same tokens within
the whole. So that is what is tried, on a copy: each known layer keeps every token to itself, and the model runs on a
short sequence, on its beginning and on its end, with their positions. Where the parts differ from the whole, a layer
carries a state, reads its neighbours or counts tokens, whatever its class is called; and a layer of any name through
which nothing passes from token to token is taken. The copy has numbers of its own, drawn from a small table: it takes
no memory to speak of, and a model on the meta device is tried like any other.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from leetdist.integrations.registry import handler_of
from leetdist.sequence.transport import Transport

TOKENS, CUT = 23, 11
PARTS = (slice(0, CUT), slice(CUT, TOKENS))
TOLERANCE = 1e-3


class Untried(Exception):
    """The module cannot be called here, so that nothing is known of it."""


def mixing(
    module: nn.Module,
    known: Iterable[nn.Module],
    *,
    call: Callable[[nn.Module, slice], Any],
    prepare: Callable[[nn.Module], None] | None = None,
) -> dict[str, str]:
    """Name -> class of the modules in `module` through which tokens reach others, besides those that are known.

    Args:
        module: left as it is.
        known: modules in it that are kept from mixing, and so are not looked at.
        call: runs a module on the tokens of a slice of `range(TOKENS)`, their numbers being their positions.
        prepare: what else is to be done to the copy.

    Raises:
        Untried: `call` fails.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        names = {name for name, child in module.named_modules() if child in set(known)}
        try:
            tried = _copy(module)
            names &= dict(tried.named_modules()).keys()  # those of layers like earlier ones are not there
            for name in names:
                _keep_apart(tried.get_submodule(name))
            if prepare is not None:
                prepare(tried)
            whole, *parts = (_run(tried, call, part) for part in (slice(0, TOKENS), *PARTS))
        except Exception as error:
            raise Untried(f"{type(error).__name__}: {error}".splitlines()[0][:300]) from error
    culprits = _culprits(tried, names, whole, parts)
    return {name: type(tried.get_submodule(name)).__name__ for name in culprits}


def call_alone(module: nn.Module, part: slice) -> Any:
    """Runs a module of unknown kind: on tokens if it begins with an embedding, else on features of a fitting width."""
    parameters = inspect.signature(module.forward).parameters
    more = {name: torch.arange(TOKENS)[None, part] for name in ("position_ids", "positions") if name in parameters}
    first = next((child for child in module.modules() if isinstance(child, nn.Embedding)), None)
    if first is not None and next(module.parameters(), None) is first.weight:
        return module(token_ids(first.num_embeddings)[:, part], **more)
    return module(_features(_width(module))[:, part], **more)


def token_ids(vocabulary: int) -> Tensor:
    """(1, TOKENS), no two alike where there are enough, away from the first few, which often are special."""
    return ((torch.arange(TOKENS) * 7 + 5) % max(vocabulary, 1))[None]


def _features(width: int) -> Tensor:
    return torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0))


def _width(module: nn.Module) -> int:
    for child in module.modules():
        if isinstance(child, nn.Linear):
            return child.in_features
        if isinstance(child, nn.LayerNorm | nn.RMSNorm):
            return int(child.normalized_shape[-1])
    shapes = [parameter.shape for parameter in module.parameters() if parameter.ndim]
    return int(shapes[0][-1]) if shapes else 8


# --- the copy


def _copy(module: nn.Module) -> Any:
    """The module with other numbers, in fp32 on the CPU, evaluating, and without groups and hooks."""
    memo: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1 << 17, generator=generator)
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_numbers(parameter, table, child), requires_grad=False)
        for buffer in child._buffers.values():
            if buffer is not None and buffer.device.type == "meta":
                memo[id(buffer)] = _filled(buffer)
            elif buffer is not None:
                memo[id(buffer)] = buffer.detach().cpu().clone()
        memo |= {id(value): None for value in vars(child).values() if _is_group(value)}
    tried = copy.deepcopy(module, memo)
    for child in tried.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
        for name, value in list(child._buffers.items()):
            if value is not None and value.is_floating_point():
                child._buffers[name] = value.float()
        child.training = False
    _shorten(tried)
    return tried


def _numbers(like: Tensor, table: Tensor, owner: nn.Module) -> Tensor:
    """A view of the table with the shape: rows overlap, so that it costs no memory."""
    shape = torch.Size(getattr(like, "ds_shape", like.shape))  # of a parameter of which ZeRO-3 has left a part here
    if len(shape) < 2:
        count = shape.numel()
        x = table[:count].reshape(shape) if count <= len(table) else torch.randn(shape)
        return 1 + 0.2 * x
    scale = 1.0 if isinstance(owner, nn.Embedding) else 1.5 * min(shape[-1], shape[-2]) ** -0.5
    strides, reach = [1], shape[-1]
    for length in reversed(shape[:-1]):
        strides.insert(0, 3 if length * 3 + reach < len(table) else 0)
        reach += strides[0] * length
    if shape[-1] > len(table) or 0 in strides:  # longer than the table: drawn anew
        rows = 1 + sum((length - 1) for length in shape[:-1])
        table = torch.randn(rows + shape[-1], generator=torch.Generator().manual_seed(1))
        strides = [1] * len(shape)
    return (table * scale).as_strided(shape, strides)


def _filled(like: Tensor) -> Tensor:
    """What a buffer on the meta device could hold: falling frequencies, and masks that hide nothing."""
    if like.is_floating_point() and like.ndim == 1:
        return torch.logspace(0, -2, len(like))
    return torch.ones(like.shape, dtype=torch.float32 if like.is_floating_point() else like.dtype)


def _is_group(value: Any) -> bool:
    return isinstance(value, dist.ProcessGroup | Transport) or hasattr(value, "mesh_dim_names")


def _shorten(model: Any) -> None:
    """Drop the layers of a transformers model that are like earlier ones."""
    outer = getattr(model, "config", None)
    for config in {id(c): c for c in (outer, getattr(outer, "text_config", None)) if c is not None}.values():
        count = getattr(config, "num_hidden_layers", None)
        stacks = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == count]
        if len(stacks) != 1 or not isinstance(count, int) or count <= 4:
            continue
        lists = [x for x in vars(config).values() if isinstance(x, list) and len(x) == count]
        signs = [(repr(layer), *(str(x[i]) for x in lists)) for i, layer in enumerate(stacks[0])]
        needed = 1 + max(signs.index(sign) for sign in signs)
        if needed < count:
            del stacks[0][needed:]
            config.num_hidden_layers = needed


def _keep_apart(layer: Any) -> None:
    """Make a layer that mixes tokens give each token its own input, in the form of what it would give."""
    if (handler := handler_of(layer)) is not None:
        handler(layer, None)  # as it will be, and not through kernels that the CPU does not have
    if getattr(layer, "is_causal", None) is True and not hasattr(layer, "hears_of_documents"):
        layer.hears_of_documents = False
        return  # softmax attention: `prepare` gives it an attention that sees nothing
    forward = layer.forward
    layer.hears_of_documents = False

    @functools.wraps(forward)
    def apart(*args: Any, **kwargs: Any) -> Any:
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        layer.hears_of_documents |= kwargs.get("cu_seqlens") is not None

        def own(y: Any) -> Any:
            if not isinstance(y, Tensor):
                return y
            if y.shape[:-1] != x.shape[:-1]:
                return torch.zeros_like(y)
            return x if y.shape == x.shape else x.mean(-1, keepdim=True).expand_as(y)

        return tree_map(own, forward(*args, **kwargs))

    layer.forward = apart


# --- the comparison

Record = dict[str, list[tuple[list[Tensor], list[Tensor]]]]


def _run(module: nn.Module, call: Callable[[nn.Module, slice], Any], part: slice) -> Record:
    """The tensors that went into and came out of each module, in the order of its calls."""
    record: Record = {}
    with _recording(module, record):
        call(module, part)
    return record


@contextmanager
def _recording(module: nn.Module, record: Record) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            record.setdefault(name, []).append((_tensors((args, kwargs)), _tensors(output)))

        return note

    handles = [x.register_forward_hook(hook(n), with_kwargs=True) for n, x in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Any) -> list[Tensor]:
    values = dict(values) if hasattr(values, "keys") else values
    return [x.detach().clone() for x in tree_leaves(values) if isinstance(x, Tensor)]


def _culprits(tried: nn.Module, known: set[str], whole: Record, parts: list[Record]) -> list[str]:
    """The innermost modules that get what they should, and give what they should not; all is well if the outermost
    one gives what it should."""
    pairs = list(zip(PARTS, parts, strict=True))
    if all(_agree(whole[""], part[""], where, 1) for where, part in pairs):
        return []
    found: list[str] = []
    for name in whole:  # in the order in which calls end: inner ones first
        if name in known or any(not name or inner.startswith(name + ".") for inner in found):
            continue
        calls = [(where, part.get(name, [])) for where, part in pairs]
        if any(len(part) != len(whole[name]) for _, part in calls):
            continue
        if all(_agree(whole[name], part, where, 0) for where, part in calls) and not all(
            _agree(whole[name], part, where, 1) for where, part in calls
        ):
            found.append(name)
    return found or [""]


def _agree(whole: Any, part: Any, where: slice, side: int) -> bool:
    """Whether all tensors of one side (0: in, 1: out) of all calls of a module are those of the whole, at that part.
    Numbers that come out must belong to tokens."""
    for ours, theirs in zip(part, whole, strict=True):
        if len(ours[side]) != len(theirs[side]):
            return False
        if not all(_same(x, y, where, out=side == 1) for x, y in zip(ours[side], theirs[side], strict=True)):
            return False
    return True


def _same(part: Tensor, whole: Tensor, where: slice, *, out: bool) -> bool:
    if part.ndim != whole.ndim:
        return False
    count = where.stop - where.start
    for dim, (mine, all_) in enumerate(zip(part.shape, whole.shape, strict=True)):
        if mine != all_:
            if mine * TOKENS != all_ * count:
                return False
            whole = whole.narrow(dim, where.start * all_ // TOKENS, mine)
    if not out and part.shape == whole.shape and not part.is_floating_point():
        return bool((part == whole).all())
    finite = whole[whole.isfinite()].abs() if whole.is_floating_point() else whole.abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(part.double(), whole.double(), rtol=0, atol=TOLERANCE * scale, equal_nan=True)


__all__ = ["TOKENS", "Untried", "call_alone", "mixing", "token_ids"]
