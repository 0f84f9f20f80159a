"""Plans of calls whose backward op is still to come: an op gets tensors, and finds its forward's plan by the memory of
one of them. So the ranks of a group agree once a call, as they do without ops."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from leetdist.engine.plan import Plan


class PendingPlans:
    """The plan of each call by the memory that is kept for its backward, as long as somebody holds that: while a weak
    reference to it is here, no other memory goes by its number."""

    def __init__(self, few: int = 64) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Plan]] = {}
        self._few = self._most = few

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, x: Tensor, plan: Plan) -> None:
        if len(self._known) >= self._most:
            for number, (memory, _) in list(self._known.items()):  # other threads add to it
                if memory.expired():
                    self._known.pop(number, None)
            self._most = max(self._few, 2 * len(self._known))
        memory = StorageWeakRef(x.untyped_storage())
        self._known[memory.cdata] = memory, plan

    def of(self, x: Tensor) -> Plan | None:
        """None where x is other memory: a copy, or what a call has kept that had no plan of its own."""
        known = self._known.get(x.untyped_storage()._cdata)
        return None if known is None else known[1]
