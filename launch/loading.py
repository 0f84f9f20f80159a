"""Models from folders, and text from and to tokens."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import leetdist
from leetdist.launch.model import Config, LanguageModel

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

WEIGHTS = "model.safetensors"


class Text(Protocol):
    """Between text and tokens."""

    name: str

    def encode(self, text: str) -> list[int]: ...

    def spoken(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come: whole characters only."""


class Bytes:
    """Tokens are the bytes of UTF-8."""

    name = "tokens are bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def spoken(self, tokens: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([token % 256]))
        yield decoder.decode(b"", final=True)


class Tokenizer:
    """A Hugging Face tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.name = f"{type(self.tokenizer).__name__} of {len(self.tokenizer)} tokens"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def spoken(self, tokens: Iterable[int]) -> Iterator[str]:
        line: list[int] = []
        shown = ""
        for token in tokens:
            line.append(token)
            text: str = self.tokenizer.decode(line)
            if text.endswith("\ufffd"):  # in the middle of a character
                continue
            yield text[len(shown) :]
            line, shown = ([], "") if text.endswith("\n") else (line, text)


def save_language_model(folder: Path, model: LanguageModel) -> None:
    """What `load_language_model` reads: the weights, and the sizes in their metadata."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, {"config": json.dumps(vars(model.config))})


def load_language_model(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[LanguageModel, Text]:
    """A model of `leetdist.launch train`."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise SystemExit(f"{folder} holds neither config.json of a Hugging Face model nor {WEIGHTS}")
    with safe_open(folder / WEIGHTS, "pt") as file:
        config = Config(**json.loads(file.metadata()["config"]))
    model = LanguageModel(config)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(device, dtype).eval(), Bytes()


def load_hugging_face(
    folder: Path, device: torch.device, dtype: torch.dtype, group: Group | None
) -> tuple[torch.nn.Module, Text]:
    """A causal language model of transformers, its linear attention through leetdist where it has any."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return leetdist.parallelize(model, group), Tokenizer(folder) if has_tokenizer else Bytes()
