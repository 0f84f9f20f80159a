"""What is remembered between calls, and never without bound."""

from __future__ import annotations

from typing import TypeVar

import torch

Key = TypeVar("Key")
Value = TypeVar("Value")


def keeps() -> bool:
    """Whether a tensor that is made now serves other calls too: a fake one belongs to the mode that is active."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


class Memo(dict[Key, Value]):
    """A dictionary of at most `most` entries: one more, and it begins anew.

    Nothing but time is lost, and reading, which calls wait for, costs what it costs in a dictionary. Programs that
    need more at a time than it holds are as slow as without; so `most` is several times what models need.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: Key, value: Value) -> None:
        if len(self) >= self.most and key not in self:
            self.clear()
        super().__setitem__(key, value)
