"""Continue a text: the prompt over all ranks, then token by token. Prints the text as it comes, then the figures.

    python -m leetdist.launch generate --model runs/demo --prompt "Once upon a time"
    torchrun --nproc-per-node 4 -m leetdist.launch generate --model runs/demo --prompt-file book.txt
    accelerate launch --multi_gpu --num_processes 4 -m leetdist.launch generate --model FOLDER --prompt-file book.txt

The model is a checkpoint of `leetdist.launch train`, or a Hugging Face folder. The ranks share the prompt: each
computes its shard of every piece, and all end with the state of the whole. The first goes on alone; with --everywhere
all do, each with a draw of its own. A prompt's state can be kept (--save-state) and gone on from (--load-state), on any
number of ranks. Memory does not grow with the prompt (but for the softmax layers of a Hugging Face model).
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from leetdist.inference.files import load_states, save_states
from leetdist.inference.session import Session, fingerprint
from leetdist.launch.loading import Text, load_hugging_face, load_language_model
from leetdist.launch.runtime import Arguments, Rank, joined, one_message, positive

HOUR = 3600.0


class Continues(Protocol):
    """A model in the middle of a text."""

    def prefill(self, tokens: Tensor) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...


class HuggingFace:
    """A transformers model and its cache. `parallelize` shards the prompt and leaves the whole cache on every rank."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.cache = model, None

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """(1, N) tokens, the same on every rank; the next one's logits, (1, vocab)."""
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    step = prefill


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    # The others wait for the one that decodes.
    with joined(options.device, timeout_s=options.timeout_hours * HOUR) as rank:
        return run(options, rank)


def run(options: argparse.Namespace, rank: Rank) -> int:
    begin = time.perf_counter()
    with one_message():
        session, text = _load(options, rank)
        prompt = options.prompt
        if options.prompt_file:
            prompt = Path(options.prompt_file).read_bytes().decode(errors="replace")
        tokens = torch.tensor([text.encode(prompt)], dtype=torch.long, device=rank.device)
        if not tokens.numel():
            raise SystemExit("the prompt is empty: a text to continue has at least one token")
    rank.print(f"{options.model}: {text.name}, loaded in {time.perf_counter() - begin:.1f} s")
    rank.print(f"prompt: {tokens.shape[1]:,} tokens over {rank.size} ranks ({rank.device.type}, {rank.backend})\n")

    dist.barrier()
    begin = time.perf_counter()
    drawn = _tokens(session, tokens, options, rank)
    first = next(drawn)
    first_s = time.perf_counter() - begin
    if options.save_state and rank.first:
        assert isinstance(session, Session)
        save_states(options.save_state, session.keep(), model=_identity(session))
    produced: list[int] = []
    begin = time.perf_counter()
    if rank.first or options.everywhere:
        for piece in text.spoken(_counted(first, drawn, produced)):
            if rank.first:
                print(piece, end="", flush=True)
    decode_s = time.perf_counter() - begin

    if options.everywhere and rank.size > 1:
        for other, theirs in enumerate(rank.gather(produced, "what it produced")[1:], 1):
            rank.print(f"\n\n[rank {other}] {''.join(text.spoken(iter(theirs)))}")
    rank.print(
        f"\n\ntime to first token {first_s:.3f} s ({tokens.shape[1] / first_s:,.0f} tokens/s of prompt); "
        f"{len(produced)} tokens, {max(0, len(produced) - 1) / max(decode_s, 1e-9):,.1f} tokens/s; {_memory(rank)}"
    )
    return 0


def _load(options: argparse.Namespace, rank: Rank) -> tuple[Continues, Text]:
    folder = Path(options.model)
    group = dist.group.WORLD if rank.size > 1 else None
    dtype = getattr(torch, options.dtype)
    if (folder / "config.json").exists():
        if options.load_state or options.save_state:
            raise SystemExit("--load-state and --save-state are for checkpoints of leetdist.launch train")
        model, text = load_hugging_face(folder, rank.device, dtype, group)
        return HuggingFace(model), text
    language_model, text = load_language_model(folder, rank.device, dtype, options.tokenizer, options.trust)
    session = Session(language_model, group, piece=options.piece)
    if options.load_state:
        session.resume(load_states(options.load_state, model=_identity(session), device=rank.device))
        rank.print(f"{options.load_state}: the state after {session.tokens:,} tokens")
    return session, text


def _identity(session: Session) -> str:
    assert isinstance(session.model, torch.nn.Module)
    return fingerprint(session.model.state_dict().items())


def _tokens(session: Continues, prompt: Tensor, options: argparse.Namespace, rank: Rank) -> Iterator[int]:
    """The tokens that follow, on the host, as they come; the first one comes from all ranks' work."""
    generator = torch.Generator().manual_seed(options.seed + (rank.rank if options.everywhere else 0))
    logits = session.prefill(prompt)
    for number in range(options.tokens):
        token = _draw(logits, options.temperature, options.top_k, generator)
        yield int(token)
        if number + 1 < options.tokens:
            logits = session.step(token.to(prompt.device).view(1, 1))


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token from (1, vocab) logits: the likeliest for temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float().cpu() / temperature
    if top_k:
        least = scaled.topk(min(top_k, scaled.shape[-1])).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)


def _counted(first: int, rest: Iterator[int], produced: list[int]) -> Iterator[int]:
    produced.append(first)
    yield first
    for token in rest:
        produced.append(token)
        yield token


def _memory(rank: Rank) -> str:
    if rank.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(rank.device) / 2**30:.2f} GiB of GPU memory at most (rank 0)"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory at most (rank 0)"


def _parser() -> argparse.ArgumentParser:
    parser = Arguments("leetdist.launch generate", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder: a checkpoint of leetdist.launch train, or of Hugging Face")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="\n", help="the text to continue (default: a line break)")
    prompt.add_argument("--prompt-file", help="a file with the text to continue")
    add("--tokens", type=positive, default=200, help="how many to produce (default: 200)")
    add("--temperature", type=float, default=0.0, help="of the draw; 0 takes the likeliest token (default: 0)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: from all (default: 0)")
    add("--seed", type=int, default=0, help="of the draw (default: 0)")
    add("--everywhere", action="store_true", help="every rank goes on from the prompt, with a draw of its own")
    add("--save-state", help="keep the state after the prompt in this file")
    add("--load-state", help="go on from a state kept with --save-state, before the prompt")
    add("--piece", type=positive, default=65_536, help="tokens a rank takes in at a time (default: 65536)")
    add("--tokenizer", help="of a checkpoint that was trained with one (default: bytes)")
    add("--trust", nargs="+", default=[], metavar="NAME", help="let the checkpoint unpickle this: module.name ...")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--timeout-hours", type=float, default=24.0, help="how long ranks wait for each other (default: 24)")
    return parser
