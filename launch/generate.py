"""`leetdist generate`: the prompt over all ranks, then token by token."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from leetdist.inference.checks import check_path
from leetdist.inference.files import load_states, save_states
from leetdist.inference.session import Session, fingerprint
from leetdist.launch import commands
from leetdist.launch.loading import Text, load_hugging_face, load_language_model
from leetdist.launch.progress import memory_gib
from leetdist.launch.runtime import Rank, joined, one_message

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
    options = commands.generate().parse_args(argv)
    # The others wait for the one that decodes.
    with joined(options.device, timeout_s=options.timeout_hours * HOUR) as rank:
        return run(options, rank)


def run(options: argparse.Namespace, rank: Rank) -> int:
    begin = time.perf_counter()
    with one_message():
        if options.save_state and rank.first:
            check_path(options.save_state)  # now, not when a long prompt has been taken in
        session, text = _load(options, rank)
        prompt = "\n" if options.prompt is None else options.prompt
        if options.prompt_file:
            prompt = Path(options.prompt_file).read_bytes().decode(errors="replace")
        tokens = torch.tensor([text.encode(prompt)], dtype=torch.long, device=rank.device)
        if not tokens.numel():
            raise SystemExit("the prompt is empty: a text to continue has at least one token")
        if (largest := int(tokens.max())) >= (known := _vocabulary(session)):
            raise SystemExit(f"the prompt has token {largest}, and the model knows {known}: give its own --tokenizer")
    say = (lambda _: None) if options.json else rank.print
    say(f"{options.model}: {text.name}, loaded in {time.perf_counter() - begin:.1f} s")
    say(f"prompt: {tokens.shape[1]:,} tokens over {rank.size} ranks ({rank.device.type}, {rank.backend})\n")

    dist.barrier()
    begin = time.perf_counter()
    drawn = _tokens(session, tokens, options, rank)
    first = next(drawn)
    first_s = time.perf_counter() - begin
    if options.save_state and rank.first:
        assert isinstance(session, Session)
        with one_message():
            save_states(options.save_state, session.keep(), model=_identity(session))
    produced: list[int] = []
    begin = time.perf_counter()
    if rank.first or options.everywhere:
        for piece in text.spoken(_counted(first, drawn, produced)):
            if rank.first and not options.json:
                print(piece, end="", flush=True)
    decode_s = time.perf_counter() - begin

    everyone = rank.gather(produced, "what it produced") if options.everywhere and rank.size > 1 else [produced]
    texts = ["".join(text.spoken(iter(theirs))) for theirs in everyone]
    for other, theirs in enumerate(texts[1:], 1):
        say(f"\n\n[rank {other}] {theirs}")
    figures = {
        "prompt_tokens": tokens.shape[1],
        "first_token_s": first_s,
        "tokens": len(produced),
        "tokens_per_s": max(0, len(produced) - 1) / max(decode_s, 1e-9),
        "memory_gib": memory_gib(rank.device),
        "ranks": rank.size,
    }
    if options.json:
        rank.print(json.dumps({"texts": texts, **figures}))
    say(
        f"\n\ntime to first token {first_s:.3f} s ({tokens.shape[1] / first_s:,.0f} tokens/s of prompt); "
        f"{len(produced)} tokens, {figures['tokens_per_s']:,.1f} tokens/s; {figures['memory_gib']:.2f} GiB of "
        f"{'GPU ' if rank.device.type == 'cuda' else ''}memory at most (rank 0)"
    )
    return 0


def _load(options: argparse.Namespace, rank: Rank) -> tuple[Continues, Text]:
    folder = Path(options.model)
    group = dist.group.WORLD if rank.size > 1 else None
    dtype = getattr(torch, options.dtype)
    if (folder / "config.json").exists():
        if options.load_state or options.save_state:
            raise SystemExit("--load-state and --save-state are for checkpoints of leetdist train")
        model, text = load_hugging_face(folder, rank.device, dtype, group)
        return HuggingFace(model), text
    language_model, text = load_language_model(folder, rank.device, dtype, options.tokenizer, options.trust)
    session = Session(language_model, group, piece=options.piece)
    if (options.load_state or options.save_state) and not session.in_files:
        raise SystemExit(f"{options.model}: --load-state and --save-state are for layers of one state each")
    if options.load_state:
        session.resume(load_states(options.load_state, model=_identity(session), device=rank.device))
        if not options.json:
            rank.print(f"{options.load_state}: the state after {session.tokens:,} tokens")
    return session, text


def _identity(session: Session) -> str:
    assert isinstance(session.model, torch.nn.Module)
    return fingerprint(session.model.state_dict().items())


def _vocabulary(session: Continues) -> int:
    model: Any = session.model  # type: ignore[attr-defined]
    embedding = model.embedding if isinstance(session, Session) else model.get_input_embeddings()
    return len(embedding.weight)


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
    """One token from (1, vocab) logits: the likeliest for temperature 0, and for one so low that they overflow."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float().cpu() / temperature
    if scaled.amax().isinf():
        return logits.argmax(-1)
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
