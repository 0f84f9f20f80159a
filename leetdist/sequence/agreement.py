"""What the ranks of a group must agree on before they exchange tensors: checked on every call, exchanged once.

Each rank keeps, for every argument set of its own that it has seen, what all ranks had. A call compares fingerprints
of that: 48 bytes, through shared memory on one host, else in ceil(log2 P) messages to a rank; only where they differ
do the ranks send each other everything. Looking at one's own arguments alone would not do: a rank whose shard is as
long as ever must still learn that another's has changed, because the tile length may change with the total.

To check, compare and plan takes 4 ranks on the host of 4 H200s 95 us, 1,015 the first time, 55 where lengths are
declared, and 33 without a group (benchmarks/agreement.py; results/scaling/agreement_h200_host.json). It is host
time: a GPU that has work queued does not wait for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from leetdist.kernels.common.memo import Memo
from leetdist.sequence.site import Site, warn_of
from leetdist.sequence.transport import Transport

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


def agree(
    mine: Hashable | ValueError,
    transport: Transport,
    what: str,
    *,
    values: int = 0,
    site: Site | None = None,
    declared: bool = False,
) -> Agreement:
    """All ranks' `mine`, the same on every rank. A rank whose own arguments are bad passes its error instead, so that
    the others fail too, and at once.

    values: digest of what must be equal on all ranks but changes too often to remember (log_decay's values).
    site: the line of the program that makes the call; a warning where the ranks' are not one.
    declared: the caller promises that no rank's arguments change unseen; then what is known is not compared.
    """
    known: Agreement | None = None
    if not isinstance(mine, ValueError):
        known = transport.agreements.get((what, mine))
    if known is not None and (declared or transport.size == 1):
        return known
    with transport.call("agreement"):
        # No fingerprint is negative: where one rank knows nothing, all ranks see it.
        fingerprint = -1 - transport.rank if known is None else known.fingerprint
        if not _differ(fingerprint, values, site, transport, what) and known is not None:
            return known
        gathered = transport.gather_objects((mine, values), what)
    for rank, (theirs, _) in enumerate(gathered):
        if isinstance(theirs, ValueError):
            if rank == transport.rank:
                raise theirs
            raise Disagreement(f"rank {rank} of {transport.size} has bad arguments: {theirs}")
    everyone = tuple(theirs for theirs, _ in gathered)
    agreement = Agreement(everyone, digest(repr(everyone).encode()))
    differing = [rank for rank, (_, theirs) in enumerate(gathered) if theirs != gathered[0][1]]
    if differing:
        raise Disagreement(
            f"the ranks of the group disagree on the values of log_decay: those of rank {differing[0]} are not rank 0's"
        )
    transport.agreements[what, mine] = agreement
    return agreement


def digest(data: bytes) -> int:
    """A positive number of 62 bits that differs where the data does."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 2


def _differ(fingerprint: int, values: int, site: Site | None, transport: Transport, what: str) -> bool:
    """Whether any two ranks came with different numbers; the same answer on every rank."""
    line = 0 if site is None else site.number
    numbers = transport.largest([fingerprint, -fingerprint, values, -values, line, -line], what)
    last, first = numbers[4], -numbers[5]
    if 0 < first < last and (first, last) not in transport.sites:  # every rank has told of the same ones
        transport.sites.add((first, last))
        warn_of(transport.gather_objects("" if site is None else site.words, what))
    return numbers[0] != -numbers[1] or numbers[2] != -numbers[3]
