"""Models of a few tokens go over several ranks here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """Not all of them on one, as in tiles by their length: for fixtures of a module, too, that start ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEETDIST_TILE", "16")
        yield
