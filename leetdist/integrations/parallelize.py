"""`parallelize`: find the layers that mix tokens, and make each work on a shard; refuse what is not known."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.distributed.tensor import DTensor

from leetdist.inference.attend import TILE
from leetdist.integrations import models, probe
from leetdist.integrations.record import NAME, Before, Record, records_of
from leetdist.integrations.registry import Handler, becomes_exact, handler_of, register
from leetdist.mesh import sequence_group
from leetdist.nn.checks import check_exact

if TYPE_CHECKING:
    from leetdist.mesh import Mesh

M = TypeVar("M", bound=nn.Module)

# Through these tokens reach each other, or a batch's other rows while training: nothing needs to be tried.
_MIXING = (
    nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.AvgPool1d, nn.MaxPool1d, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_POINTWISE = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.modules.dropout._DropoutNd,
    nn.modules.loss._Loss,
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"),
)  # fmt: skip
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def parallelize(
    model: M,
    mesh: Mesh | None,
    *,
    allow: Iterable[type[nn.Module]] = (),
    tile: int | None = None,
    exact: bool = False,
) -> M:
    """Make a model work on shards of its sequences: the layers it knows get `mesh`'s sequence ranks. In place.

    Call it before DDP, `fully_shard`, `accelerator.prepare` or `deepspeed.initialize`. The model then takes what
    `shard_batch` makes.

    It knows the layers of `leetdist.nn`; transformers' MiniMax, xLSTM, Mamba2 and its hybrids (Bamba, FalconH1,
    GraniteMoeHybrid, NemotronH, Zamba2) with their softmax layers; other transformers models that have softmax
    attention only (docs of `leetdist.integrations.transformers`); all of these within PEFT's adapters, too; and what
    `register` adds.

    A transformers model's own `loss` becomes the mean over all ranks, as `reduce_loss` computes it, and
    `generate` takes the whole prompt on every rank, shards it inside, and returns the same tokens on all: where it
    draws them (`do_sample=True`), if all ranks are seeded alike.

    Args:
        model: any module.
        mesh: a (dp, sp) mesh, or the group that shares a sequence; None, or one rank, is a drop-in that computes the
            same on one device, faster.
        allow: classes that are refused, and in which no token reaches another all the same.
        tile: tile length in tokens of all of them, a power of two >= 16; None leaves each what it has.
        exact: training, prefill, drafts and decoding of all linear layers have one set of bits (what else it takes:
            docs/reinforcement-learning.md); False leaves each what it has.

    Whether a layer that it does not know mixes tokens is tried, on a few tokens, and on a small copy of the model: with
    the known layers kept from mixing, a part of a sequence must give what it gives within the whole. A layer that
    cannot be called so, in a model that cannot be called so either, is refused.

    Returns:
        the model. Called again with the same mesh, it changes nothing; for another one, `unparallelize` comes first.

    Raises:
        ValueError: a layer carries a state, mixes tokens in another way, or asks of its attention what leetdist's does
            not do; there is no layer that leetdist knows; or the model is parallelized for another mesh or in part,
            or wrapped for training, already. The model is then unchanged.

    Shapes: (B, N_local, ...) in and out, any dtype. Source: LASP-2H, arXiv 2502.07563, for models that have both linear
    and softmax attention.

    >>> import torch, leetdist
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), leetdist.nn.LightningAttention(32, heads=2))
    >>> model = leetdist.parallelize(model, leetdist.device_mesh(sequence=1))
    >>> leetdist.parallelize(torch.nn.LSTM(8, 8), None)
    Traceback (most recent call last):
    ...
    ValueError: leetdist does not know how to shard these layers of LSTM: itself (LSTM)...
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {type(model).__name__}")
    if not isinstance(allow, Iterable) or isinstance(allow, (str, nn.Module)):
        raise ValueError(f"allow must be several classes of modules, got {allow!r}")
    allow = tuple(allow)
    for kind in allow:
        if not isinstance(kind, type):
            raise ValueError(f"allow must be several classes of modules, got {kind!r} among them")
    tile, exact = check_exact(tile, exact)
    group = sequence_group(mesh)
    _check_unwrapped(model, "call leetdist.parallelize before")
    pretrained = dict(_pretrained(model))
    if records := records_of(model):
        _check_again(model, records, mesh, pretrained)
        return model
    integrations: dict[str, Any] = {}
    if pretrained:
        _check_version(sys.modules["transformers"].__version__)
        models.load(model)
        from leetdist.integrations.transformers import Integration

        integrations = {name: Integration(model, inner, mesh, group) for name, inner in pretrained.items()}

    handlers: dict[nn.Module, Handler] = {}
    for module in model.modules():
        if (handler := handler_of(module)) is not None:
            handlers[module] = handler
    linear = list(handlers)
    strange = sorted({type(module).__name__ for module in linear if not becomes_exact(module)})
    if (exact or tile is not None) and strange:
        raise ValueError(f"exact and tile must not be given for a model with {', '.join(strange)}, which have neither")
    for integration in integrations.values():
        handlers |= integration.softmax_layers(handlers)

    refused = dict(_refused(model, handlers, integrations, allow))
    if refused:
        shown = "; ".join(f"{name or 'itself'} ({why})" for name, why in list(refused.items())[:4])
        raise ValueError(
            f"leetdist does not know how to shard these layers of {type(model).__name__}: {shown}"
            f"{' and more' if len(refused) > 4 else ''}. What passes between tokens there would silently stop at the "
            "shard's border. Teach it with leetdist.integrations.registry.register, or pass allow=[...] if no token "
            "reaches another in them"
        )
    if not handlers:
        raise ValueError(f"{type(model).__name__} has no layer that leetdist knows: nothing in it would be sharded")
    before = Before(model)
    for module, handler in handlers.items():
        handler(module, group)
    for module in linear if exact or tile is not None else ():
        layer: Any = module
        layer.tile, layer.exact = tile or layer.tile or TILE, exact or layer.exact
    for integration in integrations.values():
        integration.install(handlers)
    record = Record(mesh, list(handlers), before.changes())
    roots: set[nn.Module] = {model, *pretrained.values()}  # an adapter of PEFT may be taken from around them
    for module in roots:
        setattr(module, NAME, record)
    return model


def unparallelize(model: M) -> M:
    """Take back what `parallelize` did: the model computes whole sequences by itself again, by its own code. In place.

    Parameters stay what they are by now, also those that were added in between, such as PEFT's adapters.

    Args:
        model: what `parallelize` returned, or a module around it.

    Returns:
        the model, which may be parallelized anew, for any mesh.

    Raises:
        ValueError: nothing in the model is parallelized, or it is wrapped for training: FSDP2 and tensor parallelism
            have cut its parameters, and cannot be taken off.

    Shapes: (B, N, ...) in and out, any dtype, as before `parallelize`. Source: none; this is bookkeeping.

    >>> import torch, leetdist
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), leetdist.nn.LightningAttention(32, heads=2))
    >>> model = leetdist.parallelize(model, leetdist.device_mesh(sequence=1))
    >>> model = leetdist.parallelize(leetdist.unparallelize(model), None)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {type(model).__name__}")
    _check_unwrapped(model, "leetdist.unparallelize cannot take off")
    if not (records := records_of(model)):
        raise ValueError(f"{type(model).__name__} is not parallelized: there is nothing to take back")
    for module in records:
        delattr(module, NAME)
    for record in {id(record): record for record in records.values()}.values():
        record.undo()
    return model


def _check_again(
    model: nn.Module, records: dict[nn.Module, Record], mesh: Mesh | None, pretrained: dict[str, nn.Module]
) -> None:
    """ValueError if what is parallelized already is not all of the model, or not for this mesh."""
    name = type(model).__name__
    if any(not _same(record.mesh, mesh) for record in records.values()):
        raise ValueError(f"{name} is parallelized already, for another mesh: call leetdist.unparallelize on it first")
    inside = {x for module in records for x in module.modules()}
    layers = {x for record in records.values() for x in record.layers}
    known = [x for x in model.modules() if handler_of(x) is not None and x not in layers]
    if known or any(x not in inside for x in pretrained.values()):
        raise ValueError(
            f"{name} is parallelized already, but only in part: call leetdist.unparallelize on it, and "
            "leetdist.parallelize once its layers are complete"
        )


def _check_version(transformers: str) -> None:
    if tuple(map(int, transformers.split(".")[:2])) < (5, 15):
        raise ValueError(
            f"leetdist needs transformers 5.15 or newer, whose caches and masks it knows, got {transformers}"
        )


def _same(a: Any, b: Any) -> bool:
    return a is b or (a is not None and b is not None and bool(a == b))


def _check_unwrapped(model: nn.Module, advice: str) -> None:
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    if wrapped or hasattr(model, "_get_fsdp_state") or any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is wrapped or sharded already: {advice} DDP, fully_shard, accelerator.prepare, "
            "deepspeed.initialize or tensor parallelism"
        )


def _pretrained(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost transformers models in it, by name."""
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None:
        return
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, utils.PreTrainedModel) and not any(_within(name, outer) for outer in found):
            found.append(name)
            yield name, module


def _refused(
    root: nn.Module,
    handlers: dict[nn.Module, Handler],
    integrations: dict[str, Any],
    harmless: tuple[type[nn.Module], ...],
) -> Iterator[tuple[str, str]]:
    """(name, class and reason) of the layers through which tokens reach others, or may."""
    settled: list[str] = []  # names of what is known, and of what was tried and found to be right
    for name, integration in integrations.items():
        settled.append(name)
        for child, why in integration.refused(handlers, harmless).items():
            yield f"{name}.{child}".strip("."), why
    modules = dict(root.named_modules())
    pretrained = {modules[name] for name in integrations}
    known = {*handlers, *(x for x in modules.values() if isinstance(x, harmless)), *pretrained}
    for name, module in modules.items():
        if any(_within(name, outer) for outer in settled):
            continue
        kind = type(module)
        if module in known or _pointwise(module):
            settled.append(name)
        elif isinstance(module, _MIXING) or (isinstance(module, nn.Conv1d) and module.kernel_size != (1,)):
            settled.append(name)
            yield name, kind.__name__
        elif kind not in _CONTAINERS and not any(isinstance(x, _MIXING) for x in module.modules()):
            inside = [x for x in module.modules() if x in known]
            if any(x in pretrained for x in inside):
                continue  # it calls the model in a way of its own
            try:
                found = probe.mixing(module, inside, call=probe.call_alone)
            except probe.Untried as reason:
                if inside or (kind.forward is nn.Module.forward and next(module.children(), None) is not None):
                    continue  # holds others, which are looked at one by one
                settled.append(name)
                unwritten = kind.forward is nn.Module.forward
                yield name, kind.__name__ if unwritten else f"{kind.__name__}, which could not be tried alone: {reason}"
            else:
                settled.append(name)
                for child, what in found.items():
                    yield f"{name}.{child}".strip("."), what


def _pointwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d):
        return module.kernel_size == (1,)
    return isinstance(module, _POINTWISE) or (type(module) in _CONTAINERS and not list(module.children()))


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(outer + ".")


__all__ = ["handler_of", "parallelize", "register", "unparallelize"]
