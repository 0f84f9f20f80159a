"""A model of what a sharded call costs: how many lanes to use, and what `leetdist plan` prints.

Time is simulated, rank by rank and lane by lane, with the dependencies that the engine has (engine.passes): a lane
is folded on a rank when its tile states are there, what its neighbour sent has arrived, and the lane before it is
folded; its outputs follow. Bytes and hops are not modelled but counted, and tests compare them with what ranks send.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from leetdist.kernels.common.tiles import ceil_div
from leetdist.sequence.grid import default_tile, shard_lengths


@dataclass(frozen=True)
class Machine:
    """Rates in bytes/s, times in s. The defaults are H200s and their NVLink, measured with bf16, H = 32, D = 128 and
    Lightning's slopes (results/scaling/scaling_h200x4.json): `states` and `outputs` as bytes of tokens read and
    written (heads that forget skip tokens, and count as if they did not); `launch` what a kernel costs on top; `slots`
    how many programs run at once; a hop takes `hop` + bytes / `link`; `host` is what the host takes to launch one lane
    of a forward, twice as much for a backward."""

    name: str = "H200"
    states: float = 5.2e12
    outputs: float = 4.6e12
    memory: float = 4.28e12
    launch: float = 14e-6
    slots: int = 132
    hop: float = 5.8e-6
    link: float = 3.9e11
    host: float = 6e-4


@dataclass(frozen=True)
class Job:
    """A sharded call: (B, H, N, D) tensors of `itemsize` bytes an element, N tokens in all over `ranks`."""

    ranks: int
    tokens: int
    heads: int
    dk: int
    dv: int
    batch: int = 1
    kv_heads: int | None = None
    itemsize: int = 2
    state_itemsize: int = 4
    lengths: tuple[int, ...] | None = None
    tile: int | None = None

    @property
    def shards(self) -> tuple[int, ...]:
        return self.lengths or shard_lengths(self.tokens, self.ranks, self.grid)

    @property
    def grid(self) -> int:
        return self.tile or default_tile(self.tokens)

    @property
    def state_bytes(self) -> int:
        """What travels a hop: one state, for every head and batch entry."""
        return self.batch * self.heads * self.dk * self.dv * self.state_itemsize

    def sent_bytes(self, *, mute: int = 0) -> tuple[int, ...]:
        """Each rank's bytes on the wire in the forward scan; in the backward scan, the same read from the right."""
        one = self.state_bytes * (self.heads - mute) // self.heads
        return tuple(one if rank < self.ranks - 1 else 0 for rank in range(self.ranks))

    def saved_bytes(self) -> int:
        """Most that a rank keeps between forward and backward beside q, k, v and o: a state a tile."""
        return ceil_div(max(self.shards), self.grid) * self.state_bytes


@dataclass(frozen=True)
class Cost:
    """Of one pass, in seconds: `total` until the last rank is done, `exposed` of it not covered by computing."""

    total: float
    exposed: float


def forward(job: Job, machine: Machine, lanes: int, *, forgetting: float = 0.0) -> Cost:
    """`tile_states`, the scan, `tile_outputs`. forgetting: share of the heads that forget within a
    tile, side by side as with Lightning's slopes."""
    k, v = job.dk * _share(job), job.dv * _share(job)
    return _simulate(job, machine, lanes, (k + v,), (), (job.dk + k + v + job.dv,), forgetting)


def backward(job: Job, machine: Machine, lanes: int, *, forgetting: float = 0.0) -> Cost:
    """The reversed scan runs beside dq; dk and dv follow it."""
    q, o = job.dk, job.dv
    k, v = job.dk * _share(job), job.dv * _share(job)
    gradient = (q + o + k + v + q, q + o + k + v + o)
    return _simulate(job, machine, lanes, (q + o,), (q + o + k + v,), gradient, forgetting)


def single(job: Job, machine: Machine) -> tuple[Cost, Cost]:
    """The same call on one device."""
    alone = replace(job, ranks=1, lengths=(job.tokens,), tile=job.grid)
    return forward(alone, machine, 1), backward(alone, machine, 1)


@lru_cache(maxsize=1024)
def best_lanes(
    batch: int,
    heads: int,
    kv_heads: int,
    dk: int,
    dv: int,
    lengths: tuple[int, ...],
    tile: int,
    device_type: str,
    machine: Machine = Machine(),
    forgetting: float = 0.0,
    captured: bool = False,
) -> int:
    """How many lanes are fastest. On the CPU one: nothing computes there while a message travels.

    Lanes hide hops, but unless a CUDA graph has captured the call, the host has to launch each of them: with two lanes
    and 131,072 tokens, a forward took 4 H200s 0.5 ms and their host 2 ms.
    """
    if device_type != "cuda" or len(lengths) < 2:
        return 1
    job = Job(len(lengths), sum(lengths), heads, dk, dv, batch, kv_heads, lengths=lengths, tile=tile)
    choices = [lanes for lanes in (1, 2, 4, 8) if lanes <= kv_heads]

    def total(lanes: int) -> float:
        return sum(times(job, machine, lanes, forgetting=forgetting, captured=captured))

    return min(choices, key=total)


def times(
    job: Job, machine: Machine, lanes: int, *, forgetting: float = 0.0, captured: bool = False
) -> tuple[float, float]:
    """Seconds of a forward and of a backward, on the GPUs or, unless a CUDA graph has captured it, for the hosts."""
    there, back = (pass_(job, machine, lanes, forgetting=forgetting).total for pass_ in (forward, backward))
    host = 0.0 if captured else machine.host * lanes
    return max(there, host), max(back, 2 * host)


def lasp(job: Job, machine: Machine) -> float:
    """LASP (arXiv 2404.02882): the state travels serially, and nothing overlaps with it."""
    alone = _local(job, machine)
    return alone + (job.ranks - 1) * (machine.hop + job.state_bytes / machine.link)


def lasp2(job: Job, machine: Machine) -> float:
    """LASP-2 (arXiv 2502.07563): an all-gather of the states, each rank receives P - 1 of them, then a local sum."""
    states = (job.ranks - 1) * job.state_bytes
    return _local(job, machine) + machine.hop + states / machine.link + states / machine.memory


def zeco(job: Job, machine: Machine, blocks: int = 8) -> float:
    """ZeCO (arXiv 2507.01004, section 3): the state in K blocks, pipelined along the chain: tau + (P - 1) tau / K."""
    travel = job.state_bytes / machine.link
    return _local(job, machine) + travel + (job.ranks - 1) * (machine.hop + travel / blocks)


def _local(job: Job, machine: Machine) -> float:
    """Forward of the longest shard without any communication."""
    longest = max(job.shards)
    return forward(replace(job, ranks=1, tokens=longest, lengths=(longest,), tile=job.grid), machine, 1).total


def _share(job: Job) -> float:
    return (job.kv_heads or job.heads) / job.heads


def _simulate(
    job: Job,
    machine: Machine,
    lanes: int,
    before: tuple[float, ...],
    beside: tuple[float, ...],
    after: tuple[float, ...],
    forgetting: float,
) -> Cost:
    """before, beside and after the scan: kernels by the elements that they read and write for a token and head."""

    def kernels(elements: tuple[float, ...], tokens: int, rate: float, parts: int) -> float:
        # One program a tile and head, `slots` at a time, each at its share of the rate: too few leave the GPU idle.
        programs = max(1, round(job.batch * job.heads * ceil_div(tokens, job.grid) / parts))
        waves = ceil_div(programs, machine.slots) * machine.slots
        size = waves * min(tokens, job.grid) * job.itemsize
        return sum(size * count / rate + machine.launch for count in elements) if tokens else 0.0

    hop = machine.hop + job.state_bytes / lanes / machine.link
    arrived = [0.0] * lanes
    total = longest = 0.0
    early = int(forgetting * lanes)  # lanes up to this one forget: those without any other head
    for tokens in job.shards:
        tiles = ceil_div(tokens, job.grid)
        prepare = kernels(before, tokens, machine.states, lanes)
        fold = 2 * (tiles + 1) * job.state_bytes / lanes / machine.memory + machine.launch
        finish = kernels(after, tokens, machine.outputs, lanes)
        main = prepare * lanes + kernels(beside, tokens, machine.outputs, 1)
        longest = max(longest, main + fold + finish * lanes)
        side, handed = 0.0, []
        for lane in range(lanes):
            ready = max(side, prepare * (lane + 1))
            side = max(ready + fold, arrived[lane]) if lane < early else max(ready, arrived[lane]) + fold
            handed.append((ready + fold if lane < early else side) + hop)
            main = max(main, side) + finish
        arrived = handed
        total = max(total, main)
    return Cost(total, max(0.0, total - longest))
