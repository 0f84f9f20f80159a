"""Which release of Triton is here, and what of leetdist it serves. Imports Triton; needs no GPU."""

from __future__ import annotations

from functools import cache

# The oldest that the kernels were compiled with: torch 2.9's, and the first whose Gluon has what the kernels use.
OLDEST, OLDEST_GLUON = (3, 5), (3, 6)


@cache
def version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(getattr(triton, "__version__", "0"))


@cache
def number() -> tuple[int, int]:
    """(3, 6) of 3.6.1; (0, 0) without Triton."""
    parts = [int(part) if part.isdigit() else 0 for part in f"{version() or 0}.0".split(".")]
    return parts[0], parts[1]


@cache
def why_not_triton() -> str | None:
    """Why leetdist's Triton kernels cannot be used here, in words; None where they can."""
    found = version()
    if found is None:
        return "Triton is not installed"
    if number() < OLDEST:
        return f"Triton {found} is older than 3.5 (torch 2.9's), the oldest that the kernels were compiled with"
    return None


@cache
def why_not_gluon() -> str | None:
    """The same of the kernels for Hopper that are written in Gluon."""
    missing = why_not_triton()
    if missing is not None:
        return missing
    if number() < OLDEST_GLUON:
        return f"Triton {version()}'s Gluon lacks reductions that the kernels need; 3.6 and newer have them"
    try:
        from leetdist.kernels.runtime import gluon  # noqa: F401
    except (ImportError, AttributeError) as error:  # the dialect is an experiment, and may lose a name
        return f"Triton {version()}'s Gluon lacks what the kernels are written in: {error}"
    return None
