"""A model of your own: trained on ranks that share a sequence, checked against one process, and decoded.

    python docs/examples/own_model.py                              # one process
    torchrun --nproc-per-node 2 docs/examples/own_model.py         # gloo on CPUs, NCCL with a GPU a rank

Copy the numbered lines into a model that calls `linear_attention` itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import leetdist

VOCABULARY, DIM, HEADS, TOKENS = 61, 64, 4, 512


class Mixer(nn.Module):
    """The layer through which tokens reach others; all else is token by token, and knows nothing of ranks."""

    def __init__(self, group: DeviceMesh | None) -> None:
        super().__init__()
        self.group = group  # (1) in the module: a context around the forward is gone when the backward recomputes it
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.scale = (DIM // HEADS) ** -0.5
        self.decay = leetdist.nn.log_decay("retnet", HEADS)  # no buffer: model.bfloat16() would round it

    def project(self, x: Tensor) -> list[Tensor]:
        """(B, N, DIM) to q, k and v (B, H, N, D): views do, nothing has to be contiguous."""
        return [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def merge(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        decay = self.decay.to(x.device)
        o = leetdist.linear_attention(*self.project(x), decay, scale=self.scale, group=self.group)  # (2)
        return self.merge(o)


class Model(nn.Module):
    def __init__(self, group: DeviceMesh | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.mixers = nn.ModuleList(Mixer(group) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x)


class Decoder:
    """The same weights, a prompt first and then some tokens a call: one stream and one pool a layer."""

    def __init__(self, model: Model, slots: int) -> None:
        self.model, self.slots = model, slots

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """(1, N) tokens, as many as there are; the next one's logits, (1, vocabulary)."""
        x = self.model.embedding(prompt)
        self.pools: list[leetdist.StatePool] = []
        for norm, mixer in zip(self.model.norms, self.model.mixers, strict=True):
            stream = leetdist.stream(mixer.decay.to(x.device), scale=mixer.scale)
            x = x + mixer.merge(stream.push(*mixer.project(norm(x))))  # in pieces, if the prompt is long
            pool = leetdist.StatePool(self.slots, like=stream.state)
            (first,) = pool.put(stream.state)
            self.index = torch.tensor([first, *pool.fork(first, self.slots - 1)], device=x.device)
            self.pools.append(pool)
        return self.model.head(x[:, -1])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """(slots, T) tokens, T for each continuation; their logits, (slots, T, vocabulary)."""
        x = self.model.embedding(tokens)
        for norm, mixer, pool in zip(self.model.norms, self.model.mixers, self.pools, strict=True):
            x = x + mixer.merge(pool.steps(*mixer.project(norm(x)), self.index))
        return self.model.head(x)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def main() -> None:
    mesh = leetdist.device_mesh()  # joins what torchrun started; alone, it is this process
    device = torch.device(mesh.device_type)
    torch.manual_seed(0)
    whole = Model().to(device)
    model = Model(group=mesh["sp"]).to(device)  # (3) the ranks that share a sequence
    model.load_state_dict(whole.state_dict())
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model  # over all ranks of the job
    text = torch.randint(VOCABULARY, (1, TOKENS), device=device)  # the same on every rank
    batch = {"input_ids": text, "labels": text}

    shard = leetdist.shard_batch(batch, mesh)  # (4) this rank's tokens, labels shifted before the cut
    labels = shard["shift_labels"]
    loss_sum = loss_of(wrapped(shard["input_ids"]), labels)
    loss = leetdist.reduce_loss(loss_sum, (labels != -100).sum(), mesh)  # (5) the mean over all ranks' labels
    loss.backward()

    # Is it right? The same step in one process, on the whole sequence.
    labels = leetdist.shard_batch(batch, None)["shift_labels"]
    expected = loss_of(whole(text), labels) / (labels != -100).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)

    decoder = Decoder(whole, slots=3)
    first = decoder.prefill(text[:, :-2])
    following = decoder.step(text[:, -2:].expand(3, -1))  # two tokens in each of three continuations
    logits = whole(text)
    torch.testing.assert_close(first, logits[:, -3])
    torch.testing.assert_close(following, logits[:, -2:].expand(3, -1, -1))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} rank(s): loss {loss:.4f}, gradients and decoding as in one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
