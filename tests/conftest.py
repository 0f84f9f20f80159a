"""What every test gets: a seed of its own, and uninitialized memory that shows."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Another value draws other inputs for every test.
SEED = int(os.environ.get("LEETDIST_TEST_SEED", "0"))
# What uninitialized memory is filled with: what NaN hides (in a maximum, in "is it positive?") another number may show.
POISON = float(os.environ.get("LEETDIST_TEST_POISON", "nan"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

with contextlib.suppress(ImportError):  # a machine with a GPU may have only torch and pytest
    from hypothesis import settings

    # The same examples on every run. No deadline: the first example also pays for compilation.
    settings.register_profile("leetdist", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile("leetdist")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m interpreter` imports only the files that have such tests: not the frameworks, ten seconds a process."""
    asked = config.getoption("markexpr") == "interpreter" and collection_path.suffix == ".py"
    return True if asked and "mark.interpreter" not in collection_path.read_text() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this process cannot run; a test marked gpu and interpreter takes either."""
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda is not available")
    skip_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1, set before Python starts")
    cuda = torch.cuda.is_available()
    for item in items:
        gpu = item.get_closest_marker("gpu") is not None
        interpreter = item.get_closest_marker("interpreter") is not None
        if gpu and not cuda and not (interpreter and INTERPRETED):
            item.add_marker(skip_gpu)
        elif interpreter and not INTERPRETED and not (gpu and cuda):
            item.add_marker(skip_interpreter)


def seed_of(nodeid: str) -> int:
    """The seed of one test: it depends on the test's name, not on what ran before it."""
    return zlib.crc32(f"{SEED}:{nodeid}".encode())


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds every generator, and is the seed for a test that wants a generator of its own."""
    value = seed_of(request.node.nodeid)
    random.seed(value)
    torch.manual_seed(value)
    with contextlib.suppress(ImportError):
        import numpy as np

        np.random.seed(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.failed:
        again = f"LEETDIST_TEST_SEED={SEED} python -m pytest '{item.nodeid}'"
        report.sections.append(("seed", f"{seed_of(item.nodeid)}; to repeat it: {again}"))
    return report


def _fill(x: torch.Tensor) -> torch.Tensor:
    # Packed types such as float4 hold no NaN, and sparse tensors no uninitialized values.
    if x.layout is torch.strided and (x.is_complex() or x.is_floating_point()):
        with contextlib.suppress(NotImplementedError), torch.no_grad():
            x.fill_(POISON)
    return x


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _fill(allocate(*args, **kwargs))

    return wrapper


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills what torch.empty and its kin return with POISON, in this process.

    Fresh memory is often zero, so that an output which a kernel forgot to write passes for one
    which is zero. A test that starts processes enters this in each of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_permuted", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs under poisoned_empty, unless it is marked real_empty."""
    if request.node.get_closest_marker("real_empty"):
        yield
    else:
        with poisoned_empty():
            yield


@pytest.fixture
def forgotten() -> Iterator[Callable[[], None]]:
    """Nothing is remembered of which kernels compute what, before and after; called, neither in between."""
    from helpers import forget_kernels

    forget_kernels()
    yield forget_kernels
    forget_kernels()
