"""Text to train on: a file, a folder, or a data set of the `datasets` library, as bytes or through a tokenizer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = (".c", ".h", ".json", ".md", ".py", ".rst", ".tex", ".txt")


def documents(source: str) -> Iterator[str]:
    """The texts of a file, of a folder's text files in the order of their paths, or of a data set's "text" column."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        # Python's own library holds everybody else's as well.
        files = [p for p in files if not {"site-packages", "dist-packages"} & set(p.relative_to(path).parts)]
        if not files:
            raise SystemExit(f"--text {source}: no file in it ends in {', '.join(SUFFIXES)}")
    elif path.is_file():
        files = [path]
    else:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise SystemExit(
                f"--text {source}: no such file or folder; to read a data set of that name, pip install datasets"
            ) from None
        name, _, split = source.partition(":")
        yield from (row["text"] for row in datasets.load_dataset(name, split=split or "train"))
        return
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def load_tokens(source: str, tokenizer: str | None = None, *, limit: int | None = None) -> tuple[Tensor, int]:
    """One row of tokens, uint8 or int32, at most `limit` of them, and the size of the vocabulary.

    Without a tokenizer a token is a byte of UTF-8; otherwise `tokenizer` is what transformers' AutoTokenizer takes.
    """
    parts, count = [], 0
    encode = None
    if tokenizer is not None:
        encode = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tokenizer)
    for text in documents(source):
        if encode is None:
            part = np.frombuffer(text.encode(), dtype=np.uint8)
        else:
            part = np.asarray(encode(text)["input_ids"], dtype=np.int32)
        parts.append(part)
        count += len(part)
        if limit is not None and count >= limit:
            break
    tokens = torch.from_numpy(np.concatenate(parts)[:limit] if parts else np.empty(0, np.uint8))
    return tokens, 256 if encode is None else len(encode)


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive sequences of `length` tokens, each with the tokens that come next."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        if len(tokens) <= length:
            raise SystemExit(
                f"the text has {len(tokens)} tokens: too few for a sequence of {length} and the next token"
            )
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.tokens[index * self.length :][: self.length + 1].long()
        return {"input_ids": window[:-1], "shift_labels": window[1:]}
