"""What the ranks of a group must agree on before they exchange tensors: checked on every call, exchanged once.

Each rank keeps, for every argument set of its own that it has seen, what all ranks had. A call compares one number
made of that, through shared memory on one host, else in ceil(log2 P) messages to a rank; only where the ranks' numbers
differ do they send each other everything. Looking at one's own arguments alone would not do: a rank whose shard is as
long as ever must still learn that another's has changed, because the tile length may change with the total.

What that costs the hosts: benchmarks/host.py. It is host time: a GPU that has work queued does not wait for it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.runtime.memo import Memo
from leetdist.sequence.group import declared_lengths, untraced
from leetdist.sequence.site import Site, warn_of
from leetdist.sequence.transport import Transport

_WORD = (1 << 62) - 1
NOTHING = -1  # told where a rank knows of no agreement; the number of none is negative
MOST = 512  # of what callers derive from one: layers have decays of their own, and learnt ones change every step


@dataclass
class Agreement:
    """What every rank brought, in rank order; `memo` holds what callers derive from it (plans). confirmed: what this
    led to on each rank has been compared too."""

    everyone: tuple[Any, ...]
    fingerprint: int
    memo: Memo[Any, Any] = field(default_factory=lambda: Memo(MOST))
    confirmed: bool = False


class Disagreement(ValueError):
    """Raised on every rank of a group, because of one rank's arguments."""


@untraced
def agree(
    mine: Hashable | ValueError,
    transport: Transport,
    what: str,
    *,
    values: int = 0,
    site: Site | None = None,
    lengths: tuple[int, ...] | None = None,
    asked: Agreement | None = None,
) -> Agreement:
    """All ranks' `mine`, the same on every rank. A rank whose own arguments are bad passes its error instead, so that
    the others fail too, and at once.

    values: digest of what must be equal on all ranks but changes too often to remember (log_decay's values).
    site: the line of the program that makes the call; a warning where the ranks' are not one.
    lengths: what the caller promises each rank to hold, and that no rank's arguments change unseen; then nobody waits
    to compare what is known of these lengths (`holds`).
    asked: what this rank has compared for this call already, in vain (`holds`).
    """
    known = asked
    with transport.call("agreement"):
        if asked is None:
            key = (what, mine) if lengths is None else (what, mine, lengths)
            known = None if isinstance(mine, ValueError) else transport.agreements.get(key)
            if known is None:
                other = None if lengths is None else transport.tell(NOTHING)
                if other is not None:
                    raise mine if isinstance(mine, ValueError) else _broken(other, transport)
                transport.alike(NOTHING - transport.rank, what)  # all ranks see that one knows nothing
            elif holds(known, transport, what, values=values, site=site, promised=lengths is not None):
                return known
        message = (mine, values, site, known and known.fingerprint)
        brought = transport.gather_objects(message, what, fails=isinstance(mine, ValueError))
    return _settled(brought, known, transport, what)


@contextmanager
def told(transport: Transport | None, what: str) -> Iterator[None]:
    """Around checks that come before `agree`: a ValueError inside is raised here, and also by the ranks that wait in
    `agree`, which are told of it."""
    try:
        yield
    except ValueError as error:
        if transport is not None and transport.size > 1:
            agree(error, transport, what, lengths=declared_lengths(transport))
        raise


@untraced
def gathered(mine: Any, transport: Transport, what: str) -> list[Any]:
    """Every rank's `mine`, plain values, on every rank; a ValueError instead is raised there and, told of, elsewhere.
    For what is asked once, where nothing is worth remembering."""
    with transport.call("agreement"):
        everyone = transport.gather_objects(mine, what, fails=isinstance(mine, ValueError))
    for rank, theirs in enumerate(everyone):
        _raise_if_bad(theirs, rank, transport)
    return everyone


def _raise_if_bad(theirs: Any, rank: int, transport: Transport) -> None:
    if isinstance(theirs, ValueError):
        if rank == transport.rank:
            raise theirs
        raise Disagreement(f"rank {rank} of {transport.size} has bad arguments: {theirs}")


def holds(known: Agreement, transport: Transport, what: str, *, values: int, site: Site | None, promised: bool) -> bool:
    """Whether every rank makes this call with what was agreed on; the same answer on every rank. Where it is False,
    all of them go on by `agree`, and say that they have asked.

    promised: nobody waits for an answer. Who breaks the promise is found on one host, by what ranks have told so far:
    those who come later are told in this call, and those who have been there in their next. A Disagreement.
    """
    if transport.size == 1:
        return True
    if promised:
        other = transport.tell((known.fingerprint + 3 * values) & _WORD)
        if other is None:
            return True
        with transport.call("agreement"):  # somebody may wait for this rank, or have sent to it: the group has failed
            raise _broken(other, transport)
    line = 0 if site is None else transport.sites.get(site.number, site.number)
    with transport.call("agreement"):
        return transport.alike((known.fingerprint + 3 * values + 5 * line) & _WORD, what)


def _broken(other: int, transport: Transport) -> Disagreement:
    return Disagreement(
        f"rank {other} of {transport.size} makes another call than rank {transport.rank}, or with other arguments, "
        f"though sequence_parallel(lengths=...) promises that none changes unseen"
    )


def _settled(brought: list[Any], known: Agreement | None, transport: Transport, what: str) -> Agreement:
    """What follows from every rank's arguments, digest of values, site, and what it took for agreed (None: nothing)."""
    for rank, (theirs, *_) in enumerate(brought):
        _raise_if_bad(theirs, rank, transport)
    everyone, values, sites, fingerprints = zip(*brought, strict=True)
    _compare_sites([None if site is None else Site(*site) for site in sites], transport)
    differing = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
    if differing:
        raise Disagreement(
            f"the ranks of the group disagree on the values of log_decay: those of rank {differing[0]} are not rank 0's"
        )
    fingerprint = digest(repr(everyone).encode())
    if known is not None and set(fingerprints) == {fingerprint}:  # it was the sites
        return known
    # Where one rank makes a new one all do, for they compare more, once each (`confirmed`).
    agreement = Agreement(everyone, fingerprint)
    transport.make_room()
    transport.agreements[what, everyone[transport.rank]] = agreement
    return agreement


def _compare_sites(sites: list[Site | None], transport: Transport) -> None:
    """A warning, once for these lines, where the ranks make the call in several; from then on they count as one. (All
    ranks see the same sites, so they keep the same table.)"""
    lines = [site for site in sites if site is not None]
    numbers = {transport.sites.get(site.number, site.number) for site in lines} | ({0} if None in sites else set())
    if len(numbers) > 1:
        transport.sites.update((site.number, min(numbers)) for site in lines)
        if 0 not in numbers:
            warn_of([site.words for site in lines])


def checksum(x: Tensor) -> int:
    """Of the bits of a tensor."""
    bits = x.detach().contiguous().reshape(-1).view(torch.uint8)
    data = bytearray(bits.numel())
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(bits)
    return zlib.crc32(data)


def digest(data: bytes) -> int:
    """A positive number of 62 bits that differs where the data does."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 2
