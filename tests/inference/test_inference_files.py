"""States in files: everything comes back, and what does not belong is refused."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import leetdist
from leetdist.inference.files import _digest
from leetdist.inference.state import State

LOG_DECAY = torch.tensor([0.0, -0.5])


def made(tokens: int = 37, dtype: torch.dtype = torch.bfloat16, tile: int = 16, *, by_token: bool = False) -> State:
    stream = leetdist.stream(None if by_token else LOG_DECAY, tile=tile)
    own = [-torch.rand(2, 2, tokens)] if by_token else []
    stream.push(*(torch.randn(2, 2, tokens, 8).to(dtype) for _ in range(3)), *own)
    return stream.state


def test_options_may_be_numpys(tmp_path: Path) -> None:
    """As `linear_attention` takes them, and a file keeps them."""
    tensors = [torch.randn(2, 2, 37, 8) for _ in range(3)]
    kept = []
    for scale, tile in ((np.float32(0.5), np.int64(16)), (0.5, 16)):
        stream = leetdist.stream(LOG_DECAY, scale=scale, tile=tile)
        stream.push(*tensors)
        leetdist.save_states(tmp_path / "states", {"0": stream.state})
        kept.append(leetdist.load_states(tmp_path / "states")["0"])
    assert torch.equal(kept[0].now, kept[1].now)
    assert [(x.scale, x.tile) for x in kept] == [(0.5, 16)] * 2


def test_odd_arguments_are_named() -> None:
    state, odd = made(), torch.zeros(3)
    tokens: Any = [torch.randn(2, 2, 1, 8).bfloat16() for _ in range(3)]
    for name, value in (("log_decay", "x"), ("scale", odd), ("inplace", odd)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            leetdist.linear_attention_step(*tokens, state, **{name: value})
    with pytest.raises(ValueError, match=r"dtype must be .* got Tensor"):
        leetdist.StatePool(2, like=state, dtype=cast(Any, odd))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.safetensors"
    leetdist.save_states(path, {"0": made(), "1": made()}, model="a model")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [32, 37])
def test_everything_comes_back(tmp_path: Path, tokens: int, dtype: torch.dtype) -> None:
    states = {"first": made(tokens, dtype), "second": made(tokens, dtype, by_token=True)}
    path = tmp_path / "states.safetensors"
    leetdist.save_states(path, states, model="m")
    loaded = leetdist.load_states(path, model="m", like=states)
    q, k, v = (torch.randn(2, 2, 20, 8).to(dtype) for _ in range(3))
    for name, state in states.items():
        more = [q, k, v, *([-torch.rand(2, 2, 20)] if state.by_token else [])]
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


def test_a_file_cut_or_flipped_anywhere_is_refused(file: Path) -> None:
    """At every byte of the header, and any bits at random; in words, and nothing but ValueError."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    damaged = [content[:length] for length in range(begin + 1)]
    for place in (*range(begin), *(random.randrange(len(content)) for _ in range(500))):
        flipped = bytearray(content)
        flipped[place] ^= 1 << random.randrange(8)
        damaged.append(bytes(flipped))
    for bad in damaged:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=str(file)):
            leetdist.load_states(file)


def test_a_file_made_by_hand_is_told_what_it_lacks(tmp_path: Path) -> None:
    state, path = made(), tmp_path / "hand.safetensors"

    def refused(message: str, change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]) -> None:
        """With a checksum that fits."""
        tensors = {f"0.{part}": getattr(state, part).clone() for part in ("boundary", "k", "v", "log_decay")}
        fields: dict[str, Any] = {"tokens": state.tokens, "tile": 16, "scale": 1.0, "method": "block"}
        told = {"format": "leetdist.states/1", "model": "", "states": ""}
        change(told, fields, tensors)
        if told.get("states") == "":
            told["states"] = json.dumps({"0": fields})
        save_file(tensors, path, {**told, "sha256": _digest(tensors, told)})
        if not message:
            assert leetdist.load_states(path)["0"].tokens == state.tokens
            return
        with pytest.raises(ValueError, match=message):
            leetdist.load_states(path)

    refused("", lambda told, fields, tensors: None)
    refused("header has no 'model'", lambda told, fields, tensors: told.pop("model"))
    refused("header has no 'states'", lambda told, fields, tensors: told.pop("states"))
    for text in ("[1]", "{", '{"0": 1}', "[" * 100_000):
        refused("is no table of them", lambda told, fields, tensors, text=text: told.update(states=text))  # type: ignore[misc]
    refused("state '0': its header does not say 'tile'", lambda told, fields, tensors: fields.pop("tile"))
    refused(r"its header says \['age', 'method'", lambda told, fields, tensors: fields.update(age=3))
    refused("no tensor '0.k'", lambda told, fields, tensors: tensors.pop("0.k"))
    refused("tensor '1.k' is of no state", lambda told, fields, tensors: tensors.update({"1.k": torch.ones(2)}))
    for field, value in (("tokens", -1), ("tokens", 36.5), ("tile", 24), ("scale", float("nan")), ("method", "magic")):
        refused(f"state '0': {field} must be", lambda told, fields, tensors: fields.update({field: value}))  # noqa: B023
    refused(
        "log_decay must have shape",
        lambda told, fields, tensors: tensors.update({"0.log_decay": torch.ones(3)}),
    )
    refused(
        "boundary must be a dense tensor", lambda told, fields, tensors: tensors.update({"0.boundary": torch.ones(3)})
    )
    refused(
        "must have boundary's Dv", lambda told, fields, tensors: tensors.update({"0.v": state.v[..., :4].contiguous()})
    )


def test_two_writers_leave_what_one_wrote(tmp_path: Path) -> None:
    path, states = tmp_path / "states", [made(), made(40)]

    def write(state: State) -> None:
        for _ in range(20):
            leetdist.save_states(path, {"0": state})

    writers = [threading.Thread(target=write, args=(state,)) for state in states]
    leetdist.save_states(path, {"0": states[0]})
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        now = leetdist.load_states(path)["0"]
        assert torch.equal(now.boundary, states[now.tokens == 40].boundary)
    assert [entry.name for entry in tmp_path.iterdir()] == ["states"]


def test_what_is_no_state_is_not_saved(tmp_path: Path) -> None:
    for states, message in (
        (torch.zeros(3), "states must be a mapping from names to states, got Tensor"),
        ({"0": torch.zeros(3)}, "must be a State, got Tensor"),
        ({0: made(), "0": made()}, "states must be named by text, got the name 0"),
        ({"\ud800": made()}, "states must have printable names"),
    ):
        with pytest.raises(ValueError, match=message):
            leetdist.save_states(tmp_path / "states", states)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be a text, got int"):
        leetdist.save_states(tmp_path / "states", {"0": made()}, model=3)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_state_prints_as_a_line_and_has_parts_that_fit() -> None:
    state = made()
    assert repr(state) == (
        "State(tokens=37, B=2, H=2, Dk=8, Dv=8, 5 in an open tile of 16, scale=1.0, method='block', torch.float32, cpu)"
    )
    for changed, message in (
        ({"tokens": 4}, "tokens must be at least 5, got 4"),
        ({"tile": 0}, "tile must be a power of two"),
        ({"method": "vanilla"}, "method must be one that works tile by tile"),
        ({"scale": float("inf")}, "scale must be a finite number"),
        ({"boundary": None}, "boundary must be a dense tensor of 4 dimensions, got NoneType"),
        ({"k": state.k[:, :, :3]}, r"v must have shape \(B, heads, n, D\) = \(2, heads, 3, D\)"),
        ({"log_decay": torch.zeros(2, dtype=torch.int64)}, "log_decay must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(state, **changed)
    for rows in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([True, False]), [0]):
        with pytest.raises(ValueError, match="rows must be"):
            state.select(rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_decay must not be given with state"):
        leetdist.stream(LOG_DECAY, state=state)
    for options in ({"scale": 2.0}, {"tile": 16}, {"method": "block"}):
        with pytest.raises(ValueError, match="must not be given with state"):
            leetdist.stream(state=state, **options)  # type: ignore[arg-type]


def test_default_dtypes_and_devices_reach_nothing() -> None:
    tensors = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    right = leetdist.stream(tile=16).push(*tensors)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(leetdist.stream(tile=16).push(*tensors), right)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        stream = leetdist.stream(tile=16)
        assert torch.equal(stream.push(*tensors), right)
        pool = leetdist.StatePool(3, like=stream.state)
        (slot,) = pool.put(stream.state.fork(1))
        index = torch.tensor([slot], device="cpu")
        pool.steps(*(x[:, :, :1] for x in tensors), index)
    assert pool.take(0).tokens == 21
