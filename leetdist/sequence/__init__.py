"""Ranks: their shards, what they agree on, and how they talk.

- grid, shard: where tokens lie, and moving them. agreement, encoding: what ranks must have in common.
- transport: the interface of what carries messages; virtual (threads), p2p (gloo, NCCL) and symmetric (one-sided copies
  within a node) are the ones there are, and group chooses. A new one has virtual's shape (docs/extending.md).
- board, blame, memory: who died, failed or is late. pipeline: how many lanes to use, by a model of hops.
"""
