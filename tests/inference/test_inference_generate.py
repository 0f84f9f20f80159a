"""From a prompt over ranks to decoding: the tokens of one process, on any number of ranks and from any file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.inference.session import Session, fingerprint
from leetdist.launch.loading import Bytes, load_language_model
from leetdist.launch.model import Config, LanguageModel

CONFIG = Config.preset("tiny")
PROMPT = 333  # no multiple of anything
PROMPT_TEXT = "In the beginning was the tile. " * 9


def model() -> LanguageModel:
    torch.manual_seed(5)
    model = LanguageModel(CONFIG).eval()
    with torch.no_grad():  # random weights of the usual size say the same whatever came before
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def prompt() -> Tensor:
    return torch.randint(256, (1, PROMPT), generator=torch.Generator().manual_seed(2))


def greedy(session: Session, logits: Tensor, count: int = 24) -> list[int]:
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(session.step(torch.tensor([tokens[-1:]])).argmax()))
    return tokens


def alone() -> list[int]:
    """The oracle: the model over the whole text again for every token."""
    whole, text = model(), prompt()
    with torch.no_grad():
        for _ in range(24):
            text = torch.cat((text, whole(text)[:, -1:].argmax(-1)), 1)
    return text[0, PROMPT:].tolist()


def test_decoding_goes_on_where_the_prompt_ended() -> None:
    session = Session(model())
    tokens = greedy(session, session.prefill(prompt()))
    assert tokens == alone()
    assert len(set(tokens)) > 5
    assert session.tokens == PROMPT + 23
    forgot = Session(model())
    assert greedy(forgot, forgot.prefill(prompt()[:, -3:])) != tokens  # the state matters


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_rank_goes_on_from_a_shared_prompt(ranks: int) -> None:
    """In one piece, and in several: the state is handed from the last rank of one to the first of the next."""

    shared = model()

    def run(group: leetdist.sequence.virtual.VirtualGroup) -> tuple[list[int], list[int]]:
        whole, pieces = Session(shared, group), Session(shared, group, piece=32)
        return greedy(whole, whole.prefill(prompt())), greedy(pieces, pieces.prefill(prompt()))

    expected = alone()
    assert leetdist.virtual_ranks(run, ranks) == [(expected, expected)] * ranks


def hand_over(rank: int, folder: str) -> list[int]:
    session = Session(model(), torch.distributed.group.WORLD, piece=64)
    logits = session.prefill(prompt())
    if rank == 0:
        leetdist.save_states(Path(folder, "prompt.safetensors"), session.keep(), model="m")
    return greedy(session, logits)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gloo_ranks_hand_over_to_each_and_to_a_file(ranks: int, tmp_path: Path) -> None:
    expected = alone()
    assert values(run_ranks(hand_over, ranks, str(tmp_path))) == [expected] * ranks
    session = Session(model())
    session.resume(leetdist.load_states(tmp_path / "prompt.safetensors", model="m"))
    assert session.tokens == PROMPT
    first = torch.tensor([expected[:1]])
    assert [expected[0], *greedy(session, session.step(first), 23)] == expected


def test_layers_with_a_decay_a_token(tmp_path: Path) -> None:
    """Over ranks, and from a file, as on one device: their decays come with the tokens, and none is kept."""
    gated = model()
    for block in gated.blocks:
        block.attention = leetdist.nn.SimpleGLA(CONFIG.dim, CONFIG.heads)
    session = Session(gated)
    logits = session.prefill(prompt())
    leetdist.save_states(tmp_path / "gated", session.keep())
    expected = greedy(session, logits)

    def run(group: leetdist.sequence.virtual.VirtualGroup) -> list[int]:
        shared = Session(gated, group)
        return greedy(shared, shared.prefill(prompt()))

    assert leetdist.virtual_ranks(run, 3) == [expected] * 3
    states = leetdist.load_states(tmp_path / "gated")
    again = Session(gated)
    again.resume(states)
    assert [expected[0], *greedy(again, again.step(torch.tensor([expected[:1]])), 23)] == expected
    with pytest.raises(ValueError, match="made with a decay a token, wanted a decay a head"):
        Session(model()).resume(states)


def test_a_prompt_forks() -> None:
    session = Session(model())
    session.prefill(prompt())
    session.fork(3)
    logits = session.step(torch.tensor([[1], [2], [3]]))
    for row, token in enumerate((1, 2, 3)):
        single = Session(model())
        single.prefill(prompt())
        torch.testing.assert_close(logits[row : row + 1], single.step(torch.tensor([[token]])))


def test_states_of_another_model_are_refused() -> None:
    session = Session(model())
    session.prefill(prompt())
    kept = session.keep()
    with pytest.raises(ValueError, match="are of 2 blocks, and the model has 4"):
        session.resume({name: kept[name] for name in list(kept)[:2]})
    other = Session(LanguageModel(replace(CONFIG, heads=4)))
    with pytest.raises(ValueError, match="the state has 2 heads, wanted 4"):
        other.resume(kept)
    assert other.states == []
    assert other.tokens == 0
    wider = Session(LanguageModel(replace(CONFIG, dim=2 * CONFIG.dim)))
    with pytest.raises(ValueError, match="the state has Dk = 64, wanted 128"):
        wider.resume(kept)
    first, second = model(), model()
    assert fingerprint(first.state_dict().items()) == fingerprint(second.state_dict().items())
    with torch.no_grad():
        second.head.weight[0, 0] += 1e-3
    assert fingerprint(first.state_dict().items()) != fingerprint(second.state_dict().items())


def test_a_kept_session_is_resumed_by_name(tmp_path: Path) -> None:
    """Of more than ten blocks, as 10 comes before 2 in the order of text; and from a mapping in any order."""
    torch.manual_seed(0)
    deep = LanguageModel(replace(CONFIG, dim=32, heads=2, hidden=64, layers=12, decay="retnet")).eval()
    with torch.no_grad():
        for parameter in deep.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    session = Session(deep)
    session.prefill(prompt())
    leetdist.save_states(tmp_path / "deep", session.keep())
    loaded = leetdist.load_states(tmp_path / "deep")
    assert list(loaded) == [f"blocks.{number}" for number in range(12)]
    token = torch.tensor([[65]])
    expected = session.step(token)
    for names in (list(loaded), sorted(loaded), list(loaded)[::-1]):
        again = Session(deep)
        again.resume({name: loaded[name] for name in names})
        assert torch.equal(again.step(token), expected)
    other = {name.replace("blocks.11", "block 11"): state for name, state in loaded.items()}
    with pytest.raises(ValueError, match=r"no 'blocks.11' among \['block 11'"):
        Session(deep).resume(other)
    with pytest.raises(ValueError, match=r"one moment: blocks.3 has 333 tokens of 2 rows, blocks.0 333 of 1"):
        Session(deep).resume({**loaded, "blocks.3": loaded["blocks.3"].fork(2)})


def test_a_session_says_what_is_wrong() -> None:
    session, token = Session(model()), torch.tensor([[1]])
    for call in (lambda: session.step(token), session.keep, lambda: session.fork(2)):
        with pytest.raises(ValueError, match=r"there was none|no prompt was taken in"):
            call()
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        session.prefill(token[:, :0])
    session.prefill(prompt())
    for tokens, message in (
        (token.expand(1, 2), r"one a row, \(B, 1\), got \(1, 2\)"),
        (token.expand(2, 1), "must have 1 rows, as before them, got 2"),
        (token.float(), "must be an int64 tensor of shape"),
        ([[1]], "must be an int64 tensor of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            session.step(tokens)
    assert session.tokens == PROMPT
    for copies in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="copies must be"):
            session.fork(copies)
    with pytest.raises(ValueError, match="piece must be at least 1, got 0"):
        Session(model(), piece=0)
    with pytest.raises(ValueError, match="model must have embedding, which Linear has not"):
        Session(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_text_comes_in_whole_characters() -> None:
    text = "Ωmega — 終"
    assert "".join(Bytes().spoken(Bytes().encode(text))) == text
    assert [piece for piece in Bytes().spoken("é".encode()) if piece] == ["é"]


def launched(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=120
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_generate_under_each_launcher(tmp_path: Path) -> None:
    """The same text from python, torchrun and accelerate launch, from a prompt and from its saved state."""
    for step, weights in ((1, LanguageModel(CONFIG)), (2, model())):  # as train saves them; the newest counts
        (tmp_path / "model" / f"step-0000000{step}").mkdir(parents=True)
        save_file(weights.state_dict(), tmp_path / "model" / f"step-0000000{step}" / "model.safetensors")
    (tmp_path / "prompt.txt").write_text(PROMPT_TEXT)
    state = str(tmp_path / "state.safetensors")
    generate = ["-m", "leetdist.launch", "generate", "--model", str(tmp_path / "model"), "--device", "cpu"]
    whole = [*generate, "--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "16", "--piece", "64"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--no-python", sys.executable]
    accelerate = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    outputs = [launched(*torchrun, *whole, "--save-state", state, "--everywhere"), launched(*accelerate, *whole)]
    expected = continued(PROMPT_TEXT)
    for output in outputs:
        assert output.split("gloo)\n\n")[1].startswith(expected)
        assert re.search(
            r"time to first token [\d.]+ s \([\d,]+ tokens/s of prompt\); 16 tokens, [\d,.]+ tokens/s; ", output
        )
        assert re.search(r"[\d.]+ GiB of memory at most", output)
    assert "279 tokens over 3 ranks (cpu, gloo)" in outputs[0]
    assert f"[rank 2] {expected}" in outputs[0]
    # From the state of three ranks, on one: the rest of a longer prompt.
    rest = launched(sys.executable, *generate, "--load-state", state, "--prompt", "And then", "--tokens", "16")
    assert "the state after 279 tokens" in rest
    assert rest.split("gloo)\n\n")[1].startswith(continued(PROMPT_TEXT + "And then"))


def continued(text: str) -> str:
    session = Session(model())
    return "".join(Bytes().spoken(greedy(session, session.prefill(torch.tensor([Bytes().encode(text)])), 16)))


def test_generate_from_a_hugging_face_folder(tmp_path: Path) -> None:
    """A MiniMax over two ranks says what transformers says; its prompt is sharded, its caches are whole."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    config = transformers.MiniMaxConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, block_size=16, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    minimax = transformers.MiniMaxForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in minimax.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    minimax.save_pretrained(tmp_path)
    text = "A tile, and a tile, and another tile in its turn. "
    expected = minimax.generate(torch.tensor([list(text.encode())]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    said = "".join(Bytes().spoken(expected[0, len(text) :].tolist()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable]
    generate = ["-m", "leetdist.launch", "generate", "--model", str(tmp_path), "--device", "cpu", "--tokens", "12"]
    assert launched(*torchrun, *generate, "--prompt", text).split("(cpu, gloo)\n\n")[1].startswith(said)


@pytest.mark.parametrize("missing", ["nothing", "another model"])
def test_folders_without_a_model_are_refused(missing: str, tmp_path: Path) -> None:
    if missing == "another model":
        save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    message = "holds neither" if missing == "nothing" else "its weights are of another model"
    with pytest.raises(SystemExit, match=message):
        load_language_model(tmp_path, torch.device("cpu"), torch.float32)
