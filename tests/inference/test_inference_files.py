"""States in files: everything comes back, and what does not belong is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import leetdist
from leetdist.inference.state import State

LOG_DECAY = torch.tensor([0.0, -0.5])


def made(tokens: int = 37, dtype: torch.dtype = torch.bfloat16, tile: int = 16) -> State:
    stream = leetdist.stream(LOG_DECAY, tile=tile)
    stream.push(*(torch.randn(2, 2, tokens, 8).to(dtype) for _ in range(3)))
    return stream.state


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.safetensors"
    leetdist.save_states(path, {"0": made(), "1": made()}, model="a model")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [32, 37])
def test_everything_comes_back(tmp_path: Path, tokens: int, dtype: torch.dtype) -> None:
    states = {"first": made(tokens, dtype), "second": made(tokens, dtype)}
    path = tmp_path / "states.safetensors"
    leetdist.save_states(path, states, model="m")
    loaded = leetdist.load_states(path, model="m", like=states)
    more = [torch.randn(2, 2, 20, 8).to(dtype) for _ in range(3)]
    for name, state in states.items():
        again = loaded[name]
        assert (again.tokens, again.tile, again.scale, again.method) == (tokens, 16, 1.0, "block")
        for part in ("boundary", "k", "v", "log_decay", "now"):
            assert torch.equal(getattr(again, part), getattr(state, part))
            assert getattr(again, part).dtype == getattr(state, part).dtype
        assert torch.equal(leetdist.stream(state=again).push(*more), leetdist.stream(state=state).push(*more))
    assert [entry.name for entry in tmp_path.iterdir()] == ["states.safetensors"]


def test_a_cut_file_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"damaged, cut short, or no safetensors file|is damaged"):
            leetdist.load_states(file)


def test_a_damaged_file_is_refused(file: Path) -> None:
    """One flipped bit anywhere: in the header, in what the states say of themselves, in a tensor."""
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    places = [3, 20, content.index(b"tokens") + 10, header + 8, header + 900, len(content) - 1]
    for place in places:
        content[place] ^= 4
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|format is"):
            leetdist.load_states(file)
        content[place] ^= 4
    file.write_bytes(content)
    assert set(leetdist.load_states(file)) == {"0", "1"}


def test_a_foreign_file_is_refused(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({"weight": torch.randn(3)}, other, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no file of save_states: its format is 'pt'"):
        leetdist.load_states(other)
    other.write_text("no tensors here")
    with pytest.raises(ValueError, match="no safetensors file"):
        leetdist.load_states(other)
    # Another tensor under the old checksum.
    tensors = load_file(file)
    tensors["0.boundary"] += 1
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    save_file(tensors, file, header["__metadata__"])
    with pytest.raises(ValueError, match="checksum does not fit"):
        leetdist.load_states(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        leetdist.load_states(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nothing to save"):
        leetdist.save_states(other, {})


def test_states_of_another_model_are_refused(file: Path) -> None:
    state = made()
    like = {"0": state, "1": state}

    def refused(message: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=message):
            leetdist.load_states(file, like={**like, "1": replace(state, **changed)})  # type: ignore[arg-type]

    leetdist.load_states(file, like=like)
    leetdist.load_states(file, like={name: state.fork(3) for name in like})  # any batch
    with pytest.raises(ValueError, match=r"states of the model 'a model', wanted 'another'"):
        leetdist.load_states(file, model="another")
    with pytest.raises(ValueError, match=r"holds the states \['0', '1'\], wanted \['0', '2'\]"):
        leetdist.load_states(file, like={"0": state, "2": state})
    refused("state '1': the state was made with tile 16, wanted 32", tile=32)
    refused("made with scale 1.0, wanted 0.5", scale=0.5)
    refused("made with method block, wanted fleet", method="fleet")
    slower = torch.nextafter(LOG_DECAY, torch.tensor([0.0, 0.0]))  # by one bit
    refused(r"log_decay \[0.0, -0.5\], wanted \[0.0, -0.49\d+", log_decay=slower)
    refused("2 heads of 8 in boundary, wanted 2 of 4", boundary=torch.zeros(2, 2, 8, 4))
    refused("k is torch.bfloat16, wanted torch.float32", k=state.k.float())
