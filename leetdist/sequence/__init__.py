"""Ranks: their shards, what they agree on, and how they talk.

- grid, documents, shard, halo: where tokens lie, and moving them. once: backward passes without a derivative.
- agreement, encoding, site: what ranks must have in common.
- transport: the interface of what carries messages; virtual (threads), p2p (gloo, NCCL) and symmetric (one-sided copies
  within a node, into inboxes) are the ones there are, and group chooses. A new one has virtual's shape
  (docs/extending.md).
- direct: p2p's messages by NCCL's own calls (nccl), without the process group's host time; watch ends the process where
  one never comes through.
- memory, mailbox, ledger: what ranks of one host tell each other without messages. board, blame: who died, failed or is
  late. timeouts: of a process group's own calls. pipeline: how many lanes to use, by a model of hops. copies: groups in
  copied and pickled modules.
"""
