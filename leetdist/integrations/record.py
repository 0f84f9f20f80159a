"""What `parallelize` has done to a model, kept with the model: it is seen when it is asked again, and can be undone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from leetdist.mesh import Mesh

NAME = "_leetdist"
# A module's dicts in which something is put or replaced, besides its attributes themselves.
_TABLES = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@dataclass
class _Change:
    """Entries of one dict of a module or configuration ("": its attributes), and its class, as they were before."""

    of: Any
    table: str
    kind: type
    replaced: dict[str, Any]
    added: list[Any]

    def undo(self) -> None:
        entries = _entries(self.of, self.table)
        for name in self.added:
            entries.pop(name, None)
        entries.update(self.replaced)
        if type(self.of) is not self.kind:
            self.of.__class__ = self.kind


@dataclass
class Record:
    """A parallelized module's mesh, the layers that got a group, and what else was changed."""

    mesh: Mesh | None
    layers: list[nn.Module]
    changes: list[_Change]

    def undo(self) -> None:
        for change in self.changes:
            change.undo()


class Before:
    """A model as it is now; `changes` are what was done to its modules and configurations since."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.seen: list[tuple[Any, str, type, dict[Any, Any]]] = [
            (thing, table, type(thing), dict(_entries(thing, table)))
            for thing in (*modules, *_configurations(modules))
            for table in ("", *(_TABLES if isinstance(thing, nn.Module) else ()))
        ]

    def changes(self) -> list[_Change]:
        found = []
        for thing, table, kind, before in self.seen:
            now = _entries(thing, table)
            replaced = {name: x for name, x in before.items() if name not in now or now[name] is not x}
            added = [name for name in now if name not in before]
            if replaced or added or type(thing) is not kind:
                found.append(_Change(thing, table, kind, replaced, added))
        return found


def records_of(model: nn.Module) -> dict[nn.Module, Record]:
    """The parallelized modules in a model, itself among them, with their records."""
    return {module: vars(module)[NAME] for module in model.modules() if NAME in vars(module)}


def _entries(thing: Any, table: str) -> dict[Any, Any]:
    entries: dict[Any, Any] = vars(thing)[table] if table else vars(thing)
    return entries


def _configurations(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of transformers models, and their parts: an attention is chosen there."""
    waiting = [x for module in modules if (x := getattr(module, "config", None)) is not None]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "__dict__"):
            found[id(config)] = config
            waiting += [
                x for name in getattr(config, "sub_configs", {}) if (x := getattr(config, name, None)) is not None
            ]
    return list(found.values())


__all__ = ["NAME", "Before", "Record", "records_of"]
