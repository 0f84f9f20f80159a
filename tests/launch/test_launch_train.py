"""launch/train.py under each launcher, with the configs that are checked in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import free_port, run_ranks, values
from leetdist.launch import __main__ as entry
from leetdist.launch.loading import load_language_model
from leetdist.launch.text import Windows, documents, load_tokens

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
ARGUMENTS = ["--text", __file__, "--tokens", "160", "--batch", "1", "--warmup", "2", "--lr", "0.003"]

pytest.importorskip("accelerate")


def metrics(out: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process without any launcher."""
    out = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "leetdist.launch", "train", *ARGUMENTS, "--steps", "3", "--out", str(out)]
    subprocess.run(command, check=True, timeout=120, cwd=LAUNCH.parent)
    return [line["loss"] for line in metrics(out)]


LAUNCHERS = {
    "torchrun": (["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "-m", "leetdist.launch.train"], {}),
    "accelerate": (
        [
            "accelerate", "launch", "--config_file", str(LAUNCH / "configs/ddp.yaml"), "--num_processes", "2",
            "--mixed_precision", "no", "--main_process_port", "PORT", str(LAUNCH / "train.py"),
        ],
        {"ACCELERATE_USE_CPU": "true"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers(name: str, alone: list[float], tmp_path: Path) -> None:
    """Two ranks that share each sequence lose what one process loses, to the last digits of fp32."""
    command, environment = LAUNCHERS[name]
    port = str(free_port())
    options = [*ARGUMENTS, "--steps", "3", "--out", str(tmp_path), "--save-every", "-1"]
    done = subprocess.run(
        [port if part == "PORT" else part for part in command] + options,
        env={**os.environ, **environment, "PYTHONPATH": str(LAUNCH.parent)},
        timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 ranks, 2 a sequence" in done.stdout
    assert [line["loss"] for line in metrics(tmp_path)] == pytest.approx(alone, rel=1e-5)
    assert list(tmp_path.rglob("events.out.tfevents.*")), "no TensorBoard log"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("plan --ranks 1000000 --tokens 10", "argument --ranks: must be at most 65536, got 1000000"),
        ("train --fsdp --deepspeed-config x", "argument --deepspeed-config/--deepspeed_config: not allowed with "),
        ("train --deepspeed-config /no/file --tokens 16", "--deepspeed-config /no/file: no such file"),
    ],
)
def test_options_that_cannot_be(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.main(arguments.split())
    assert words in capsys.readouterr().err + str(ended.value)


def train(rank: int, *arguments: str) -> None:
    from leetdist.launch.train import main

    torch.set_num_threads(1)
    main([*ARGUMENTS, "--steps", "2", "--save-every", "-1", *arguments])


def test_mixed_precision_and_accumulation(alone: list[float], tmp_path: Path) -> None:
    """accelerate's bf16 over two ranks, in one and in two micro-batches: the fp32 loss, to bf16's rounding."""
    for name, more in (("one", ()), ("two", ("--batch", "2"))):
        arguments = ("--precision", "bf16", "--checkpointing", *more, "--out", str(tmp_path / name))
        values(run_ranks(train, 2, *arguments, frameworks=True))
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(alone[:2], rel=5e-3)
    assert one != pytest.approx(alone[:2], rel=1e-6), "this was fp32"
    assert two[1] < two[0]


def test_blocks_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, and not what they are made of."""
    from leetdist.launch.train import compile_blocks

    blocks = torch.nn.ModuleList(torch.nn.ModuleList([torch.nn.Linear(2, 2)]) for _ in range(3))
    model, found = torch.nn.ModuleDict({"small": torch.nn.ModuleList([torch.nn.Linear(1, 1)]), "blocks": blocks}), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **options: found.append((part, options)))
    compile_blocks(model)
    assert found == [(block, {"dynamic": False}) for block in blocks]


def test_a_run_that_is_out_of_time_stops_and_saves(tmp_path: Path) -> None:
    arguments = ("--steps", "5", "--seconds", "0", "--save-every", "0", "--out", str(tmp_path))
    values(run_ranks(train, 2, *arguments, frameworks=True))
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    saved = tmp_path / "step-00000001"
    assert (saved / "model.safetensors").exists()
    done = subprocess.run(
        [sys.executable, "-m", "leetdist.launch", "train", *ARGUMENTS, "--steps", "1", "--resume", "--out", tmp_path],
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert f"saved: {saved};" in done.stdout, done.stdout + done.stderr  # nothing is left to train


def test_a_transformers_model_from_a_folder(tmp_path: Path) -> None:
    """MiniMax, sharded over two ranks by the script as it is."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MiniMaxConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    transformers.MiniMaxForCausalLM(config).save_pretrained(tmp_path / "model")
    for ranks in (1, 2):
        arguments = ("--model", str(tmp_path / "model"), "--checkpointing", "--out", str(tmp_path / str(ranks)))
        values(run_ranks(train, ranks, *arguments, frameworks=True))
    one, two = ([line["loss"] for line in metrics(tmp_path / str(ranks))] for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    assert one[1] != one[0]


def with_zero(rank: int, out: Path) -> None:
    """Each ZeRO config in bf16, four steps; 3 again, the last two steps from the checkpoint between."""
    import deepspeed
    from accelerate.state import AcceleratorState

    from leetdist.launch.train import main

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # two minutes of compilation
    for stage in (1, 2, 3):
        folder = out / str(stage)
        options = [*ARGUMENTS, "--steps", "4", "--checkpointing", "--out", str(folder), "--save-every", "2"]
        for more in ([], ["--resume"]) if stage == 3 else ([],):
            AcceleratorState._reset_state(reset_partial_state=True)
            config = LAUNCH / "configs" / f"zero{stage}.json"
            main([*options, "--deepspeed-config", str(config), *more])
            torch.distributed.barrier()
            if not more and stage == 3 and rank == 0:
                shutil.rmtree(folder / "step-00000004")
                (folder / "metrics.jsonl").rename(folder / "straight.jsonl")
            torch.distributed.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=r"--compile: torch\.compile finds no weights where ZeRO 3"):
        main([*options, "--deepspeed-config", str(config), "--compile"])


def test_zero_configs_in_bf16_and_resumed(alone: list[float], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    values(run_ranks(with_zero, 2, tmp_path, frameworks=True, timeout_s=120))
    for stage in (1, 2, 3):
        straight = metrics(tmp_path / str(stage), "straight.jsonl" if stage == 3 else "metrics.jsonl")
        if stage == 3:
            resumed = metrics(tmp_path / str(stage))
            assert [line["step"] for line in resumed] == [3, 4]
            assert [line["loss"] for line in resumed] == [line["loss"] for line in straight[2:]]
        assert straight[0]["loss"] == pytest.approx(alone[0], rel=5e-3)  # bf16
        assert straight[3]["loss"] < straight[0]["loss"]
        assert all(line["grad_norm"] > 0 for line in straight)
        # `generate` takes the whole model out of it.
        model, _ = load_language_model(tmp_path / str(stage), torch.device("cpu"), torch.float32)
        assert float(model.head.weight.detach().std()) > 0


def test_configs_shard_over_all_ranks_of_every_known_kind() -> None:
    found = {path.name for path in (LAUNCH / "configs").iterdir()}
    assert {"ddp.yaml", "fsdp2.yaml", "zero1.json", "zero2.json", "zero3.json"} <= found
    for stage in (1, 2, 3):
        config = json.loads((LAUNCH / "configs" / f"zero{stage}.json").read_text())
        assert config["zero_optimization"]["stage"] == stage
        assert config["bf16"]["enabled"] is True
    from accelerate.commands.config.config_args import load_config_from_file

    for name, kind in (("ddp.yaml", "MULTI_GPU"), ("fsdp2.yaml", "FSDP")):
        config = load_config_from_file(str(LAUNCH / "configs" / name))  # refuses keys that it does not know
        assert config.distributed_type == kind
        assert not config.use_cpu
    assert config.fsdp_config["fsdp_version"] == 2


def test_text_from_files_folders_and_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.txt").write_text("zwei")
    (tmp_path / "a.py").write_text("eins ")
    (tmp_path / "c.bin").write_bytes(b"no text")
    assert list(documents(str(tmp_path))) == ["eins ", "zwei"]
    tokens, vocabulary = load_tokens(str(tmp_path), limit=7)
    assert bytes(tokens.tolist()) == b"eins zw"
    assert (tokens.dtype, vocabulary) == (torch.uint8, 256)
    assert bytes(load_tokens(str(tmp_path / "b.txt"))[0].tolist()) == b"zwei"

    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [{"text": "drei"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(documents("some/corpus:validation")) == ["drei"]
    assert asked == [("some/corpus", "validation")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="no such file or folder"):
        list(documents("some/corpus"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no file in it ends in"):
        list(documents(str(tmp_path / "empty")))


def test_text_through_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"ein": 0, "Wort": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "words")
    (tmp_path / "a.txt").write_text("ein Wort ein anderes")
    tokens, vocabulary = load_tokens(str(tmp_path / "a.txt"), str(tmp_path / "words"))
    assert tokens.tolist() == [0, 1, 0, 2]
    assert vocabulary == 3


def test_windows_hold_the_next_tokens() -> None:
    windows = Windows(torch.arange(11, dtype=torch.uint8), 5)
    assert len(windows) == 2
    assert windows[1]["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert windows[1]["shift_labels"].tolist() == [6, 7, 8, 9, 10]
    assert len(Windows(torch.arange(10, dtype=torch.uint8), 5)) == 1
    with pytest.raises(SystemExit, match="too few"):
        Windows(torch.arange(5, dtype=torch.uint8), 5)


def test_batches_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    from leetdist.launch.train import main

    with pytest.raises(SystemExit, match="must be a multiple of 1 x --micro-batch"):
        main(["--text", __file__, "--batch", "3", "--micro-batch", "2", "--out", str(tmp_path)])


def test_a_cut_line_of_metrics_is_left_out() -> None:
    from leetdist.launch.progress import _step_of

    line = json.dumps({"step": 12, "loss": 1.5})
    assert _step_of(line) == 12
    assert [_step_of(line[:length]) for length in range(len(line))] == [None] * len(line)
    for damaged in ("[12]", "12", '{"step": "12"}', '{"Step": 12}', "\ufffd"):
        assert _step_of(damaged) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "no/such/folder"], "--model no/such/folder: there is no such folder"),
        (["generate", "--model", "here", "--tokens", "0"], "argument --tokens: must be at least 1, got 0"),
        (["train", "--text", "no/such/text"], "--text no/such/text: no such file or folder"),
    ],
)
def test_what_is_wrong_is_said_once(arguments: list[str], words: str, tmp_path: Path) -> None:
    """By the first of a host's ranks, without a traceback of ours."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*command, "-m", "leetdist.launch", *arguments],
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)}, cwd=tmp_path,
        timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout.count(words) == 1, done.stdout
    assert "leetdist/launch" not in done.stdout, done.stdout
