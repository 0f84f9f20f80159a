"""Models from folders, and text from and to tokens."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import leetdist
from leetdist.integrations.checkpoint import MANIFEST, about, damage, latest
from leetdist.integrations.pickles import check_pickles
from leetdist.launch.commands import PRESETS
from leetdist.launch.model import Config, LanguageModel

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


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

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
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


def load_language_model(
    folder: Path, device: torch.device, dtype: torch.dtype, tokenizer: str | None = None, trust: Collection[str] = ()
) -> tuple[LanguageModel, Text]:
    """A model that `leetdist train` saved: in the folder, or in the newest of its whole checkpoints. trust: what
    it may unpickle beside data, as "module.name"."""
    if not folder.is_dir():
        raise SystemExit(f"--model {folder}: there is no such folder")
    newest = latest(folder)
    if newest is None and (problem := damage(folder) if (folder / MANIFEST).exists() else None):
        raise SystemExit(problem)
    path = folder if newest is None else newest[1]
    if tokenizer is None and (its_own := about(path).get("tokenizer")):
        raise SystemExit(f"--model {folder}: its tokens are not bytes, it was trained with --tokenizer {its_own}")
    weights = _weights(path, trust)
    model = LanguageModel(_config(weights, folder))
    model.load_state_dict(weights)
    text: Text = Bytes() if tokenizer is None else Tokenizer(tokenizer)
    return model.to(device, dtype).eval(), text


def _weights(folder: Path, trust: Collection[str]) -> dict[str, Tensor]:
    """The whole model's, from what accelerate saved under DDP, FSDP2 or DeepSpeed."""
    if (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file

        return load_file(folder / "model.safetensors")
    if (sharded := folder / "pytorch_model_fsdp_0").is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        check_pickles(sharded, trust)
        with tempfile.TemporaryDirectory() as temporary:
            dcp_to_torch_save(sharded, Path(temporary, "model"))
            state: dict[str, Any] = torch.load(Path(temporary, "model"), weights_only=True)
        return state.get("model", state)
    if (folder / "pytorch_model").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        check_pickles(folder / "pytorch_model", trust)
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="pytorch_model"))
    raise SystemExit(
        f"{folder} holds neither a Hugging Face model (config.json) nor a checkpoint of leetdist train "
        "(model.safetensors, pytorch_model_fsdp_0 or pytorch_model)"
    )


def _config(weights: dict[str, Tensor], folder: Path) -> Config:
    """The preset that has these shapes: they tell all but the number of heads."""
    if "embedding.weight" not in weights:
        raise SystemExit(f"{folder}: its weights are of another model than leetdist.launch.model's")
    vocab, dim = weights["embedding.weight"].shape
    layers = sum(name.endswith(".down.weight") for name in weights)
    operator = "mamba2" if "blocks.0.attention.A_log" in weights else "lightning"
    for name in PRESETS:
        config = Config.preset(name, vocab, operator)
        if (config.dim, config.layers) == (dim, layers):
            return replace(
                config, learnable_decay=any(name.startswith("blocks.0.attention.log_slope") for name in weights)
            )
    raise SystemExit(f"{folder}: no preset of {', '.join(PRESETS)} has {layers} layers of width {dim}")


def load_hugging_face(
    folder: Path, device: torch.device, dtype: torch.dtype, group: Group | None
) -> tuple[torch.nn.Module, Text]:
    """A causal language model of transformers, its linear attention through leetdist where it has any."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return leetdist.parallelize(model, group), Tokenizer(str(folder)) if has_tokenizer else Bytes()
