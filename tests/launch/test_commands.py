"""The command line: every command's help, what is wrong in one line, JSON for scripts, processes by --ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import run

from leetdist.integrations.checkpoint import write_atomically
from leetdist.launch import __main__ as entry
from leetdist.launch import bench, demo, doctor, generate, plan, ranks
from leetdist.launch.commands import COMMANDS, EXTRAS, Arguments, command
from leetdist.launch.model import Config, LanguageModel
from leetdist.launch.runtime import Rank

JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SAVED = ("--save-state", "no/folder/here.safetensors")
ROOT = Path(__file__).resolve().parents[2]


def leetdist(*arguments: object, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which nobody's launcher shows."""
    clean = {name: value for name, value in os.environ.items() if name not in JOB}
    return subprocess.run(
        [sys.executable, *prefix, "-m", "leetdist.launch", *map(str, arguments)],
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said, in one line, of arguments that are wrong."""
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(entry.main(list(arguments)))
    assert ended.value.code != 0
    said = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert said.strip().count("\n") == 0, said
    return said


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_the_parser_takes_and_defaults(name: str) -> None:
    parser = COMMANDS[name].parser()
    text = parser.format_help()
    examples = text.partition("examples:\n")[2].strip().splitlines()
    assert examples
    own = [shlex.split(line.split("   ")[0]) for line in map(str.strip, examples) if line.startswith("leetdist ")]
    assert own
    for words in own:
        assert words[1] == name
        parser.parse_args(words[2:])
    shown = " ".join(text.split())
    for action in parser._actions:
        assert action.help, action.option_strings
        if isinstance(action.default, (str, int, float)) and action.default not in (False, argparse.SUPPRESS):
            assert f"(default: {action.default})" in shown, action.option_strings


def test_every_command_is_a_module_and_imports_no_extra_for_its_help() -> None:
    """Without any extra, help and wrong arguments come as they do with all of them."""
    without = f"""
import sys
import torch  # which looks for NumPy itself
sys.modules.update(dict.fromkeys({tuple(EXTRAS)!r}))
from leetdist.launch.__main__ import main
"""
    for name in COMMANDS:
        assert (ROOT / "launch" / f"{name}.py").is_file()
    every = f"""
for name in {list(COMMANDS)!r}:
    try:
        main([name, '--help'])
    except SystemExit:
        pass
main(['train'])
"""
    done = subprocess.run(
        [sys.executable, "-c", without + every], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.count("usage: leetdist ") == len(COMMANDS)
    assert done.returncode == 1
    assert done.stderr == (
        "leetdist train: accelerate is needed and not installed: pip install 'leetdist[accelerate]' "
        "(in a clone '.[accelerate]')\n"
    )


def test_usage_versions_and_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--help"]) == entry.main([]) == 0
    said = capsys.readouterr().out
    for name, (about, _) in COMMANDS.items():
        assert f"  {name:<10} {about}" in said
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("leetdist 0.")
    assert "there is no command 'verfy', but verify" in refused(capsys, "verfy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("demo --steps -1", "argument --steps: must be at least 0, got -1"),
        ("demo --ranks abc", "argument --ranks: must be a whole number, got 'abc'"),
        ("demo --device tpu", "argument --device: must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("demo --model huge", "argument --model: invalid choice: 'huge' (choose from "),
        ("demo --step 3", "unrecognized arguments: --step 3"),
        ("verify --virtual 0", "argument --virtual: must be at least 1, got 0"),
        ("doctor --device cuda:x", "argument --device: must be auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        ("plan --ranks 4", "the following arguments are required: --tokens"),
        ("plan --ranks 4 --tokens 1e5", "argument --tokens: must be a whole number, got '1e5'"),
        ("plan --ranks 4 --tokens 99 --set hop=x", "--set hop=x: 'x' is no number"),
        ("plan --ranks 4 --tokens 99 --set hop=-1", "--set hop=-1: must be finite and at least 0"),
        ("plan --ranks 4 --tokens 99 --set hop=nan", "--set hop=nan: must be finite and at least 0"),
        ("plan --ranks 4 --tokens 99 --set link=0", "--set link=0: must be finite and more than 0"),
        ("plan --ranks 4 --tokens 99 --set slots=0", "--set slots=0: must be finite and more than 0"),
        ("plan --ranks 4 --tokens 99 --plot x.xyz", "--plot x.xyz: must be a file whose name ends in .eps, .jpg, .pdf"),
        ("plan --ranks 4 --tokens 99 --plot .", "--plot .: must be a file whose name ends in .eps, .jpg, .pdf"),
        ("verify --ranks 2 --virtual 2", "argument --virtual: not allowed with argument --ranks"),
        ("generate --prompt x", "the following arguments are required: --model"),
        ("generate --model x --temperature -1", "argument --temperature: must be a number of at least 0, got '-1'"),
        ("generate --model x --timeout-hours 0", "argument --timeout-hours: must be more than 0, got '0'"),
        ("generate --model x --timeout-hours 1e8", "argument --timeout-hours: must be at most 100,000, got '1e8'"),
        ("train --lr nan", "argument --lr: must be a number of at least 0, got 'nan'"),
        ("train --seed 4294967296", "argument --seed: must be at most 4294967295, got 4294967296"),
        ("verify --seed 18446744073709551616", "argument --seed: must be at most 4294967295, got 18446744073709551616"),
        ("bench --tokens 10000000000000000000", "argument --tokens: must be at most 4611686018427387904, got "),
        ("bench --dtype int8", "argument --dtype: invalid choice: 'int8' (choose from "),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *arguments.split())
    assert said.startswith(f"leetdist {arguments.split()[0]}: {words}")
    assert f"leetdist {arguments.split()[0]} --help" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LEETDIST_BACKEND", "must be torch or triton, got 'x'"),
        ("LEETDIST_HOPPER", "must be 0 or 1, got 'x'"),
        ("LEETDIST_LANES", "must be a positive number, got 'x'"),
        ("LEETDIST_TIMEOUT", "must be a positive number of seconds, got 'x'"),
        ("LEETDIST_CHECK_VALUES", "must be 0 or 1, got 'x'"),
        ("LEETDIST_TRANSPORT", "must be auto, p2p or symmetric, got 'x'"),
    ],
)
def test_wrong_variables_are_told_in_one_line(
    name: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    for arguments in ("doctor", "bench --tokens 16", "verify --ranks 2"):
        assert words in refused(capsys, *arguments.split())


def test_a_plot_that_cannot_be_written_is_told_before_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(plan, "_given", lambda *_: pytest.fail("the machine is looked at first"))
    said = refused(capsys, "plan", "--ranks", "2", "--tokens", "99", "--plot", str(tmp_path / "file" / "plot.png"))
    assert "File exists" in said


def test_what_fails_before_a_plot_is_drawn_leaves_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Whatever the case of its name."""
    plot = tmp_path / "PLOT.PNG"
    said = refused(capsys, "plan", "--ranks", "2", "--tokens", "99", "--plot", str(plot), "--set", "hop=x")
    assert "'x' is no number" in said
    assert not plot.exists()


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("verify", "bench", "doctor"):
        assert refused(capsys, name, "--device", "cuda").startswith("--device cuda: this machine has no GPU that torch")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert refused(capsys, "bench", "--device", "cuda:2") == "--device cuda:2: this machine has 2 GPUs, from cuda:0 on"


@pytest.mark.parametrize(
    ("operator", "compared"), [("lightning", "q, dk, dv, dlog_decay"), ("mamba2", "x, ddt, dB, dC")]
)
def test_the_demo_trains_compares_keeps_and_is_gone_on_from(operator: str, compared: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four " * 50)
    options = ("--text", tmp_path / "text.txt", "--tokens", 300, "--steps", 2, "--new", 5, "--out", tmp_path / "out")
    done = leetdist("demo", "--ranks", 2, "--operator", operator, *options)
    assert done.returncode == 0, done.stdout
    assert "tokens on each rank: 128, 172" in done.stdout
    assert f"yes, bit for bit (o, state, d{compared}; 2 of 2 ranks hold tokens)" in " ".join(done.stdout.split())
    (line,) = (line.strip() for line in done.stdout.splitlines() if " generate --model" in line)
    assert line == f"{command()} generate --model {tmp_path / 'out'} --prompt 'one ' --temperature 0.7"
    unkept = ("--prompt", "one ", "--save-state", tmp_path / "state")  # told of before the prompt is taken in
    kept = leetdist("generate", "--model", tmp_path / "out", "--tokens", 1, *unkept)
    assert (kept.returncode, (tmp_path / "state").exists()) == ((0, True) if operator == "lightning" else (1, False))
    if operator == "mamba2":
        assert (
            kept.stdout.strip() == f"{tmp_path / 'out'}: --load-state and --save-state are for layers of one state each"
        )
    goes_on = leetdist("generate", "--model", tmp_path / "out", "--prompt", "one ", "--tokens", 7, "--json")
    found = json.loads(goes_on.stdout)
    assert (found["prompt_tokens"], found["tokens"], found["ranks"], len(found["texts"])) == (4, 7, 1, 1)


def test_the_demo_says_once_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line from all ranks, and nothing of torchrun's."""
    done = leetdist("demo", "--ranks", 2, "--out", tmp_path, "--text", "no/such/text")
    assert done.returncode == 1
    assert done.stdout.startswith("--text no/such/text: no such file or folder; to read a data set of that name, ")
    assert done.stdout.strip().count("\n") == 0, done.stdout
    rank = Rank(0, 1, torch.device("cpu"), "gloo")
    monkeypatch.setattr(demo, "is_launched", lambda: True)
    monkeypatch.setattr(demo, "joined", lambda _: contextlib.nullcontext(rank))
    said = refused(capsys, "demo", "--text", __file__, "--tokens", "9999999", "--out", str(tmp_path))
    assert said == f"--tokens 9999999: {__file__} has {Path(__file__).stat().st_size} bytes, one more is wanted"


def test_accelerate_that_starts_one_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --num_processes 2` on a CPU, by the environment of its only process."""
    pytest.importorskip("accelerate")
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    from leetdist.launch.train import asked_for_several

    given = ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "train.py"]
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not asked_for_several()
    before = dict(os.environ)
    for processes, several in ((1, False), (2, True)):
        arguments = launch_command_parser().parse_args([*given[:-1], "--num_processes", str(processes), given[-1]])
        _, environment = prepare_simple_launcher_cmd_env(arguments)
        for name, value in environment.items():
            if before.get(name) != value:
                monkeypatch.setenv(name, value)
        assert asked_for_several() == several
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun under accelerate, which starts all of them
    assert not asked_for_several()


def test_a_run_ends_with_where_it_is_and_what_next(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from leetdist.launch.train import closing

    options = COMMANDS["train"].parser().parse_args(["--out", str(tmp_path)])
    saved, further = closing(tmp_path / "step-00000200", options).splitlines()
    assert saved == f"saved: {tmp_path / 'step-00000200'}; metrics: {tmp_path / 'metrics.jsonl'}"
    assert further.startswith(f"{command()} generate ")
    COMMANDS["generate"].parser().parse_args(shlex.split(further.partition(" generate ")[2]))
    assert f"--model {tmp_path} " in further
    options = COMMANDS["train"].parser().parse_args(["--out", str(tmp_path), "--model", "a/model"])
    assert "--resume" in closing(tmp_path, options)
    assert closing(None, options).startswith("nothing saved (--save-every 100)")
    options = COMMANDS["train"].parser().parse_args(["--out", "a run/x", "--tokenizer", "a name"])
    advised = shlex.split(closing(tmp_path, options).splitlines()[1])
    assert advised[-7:] == ["generate", "--model", "a run/x", "--tokenizer", "a name", "--prompt", "Once upon a time"]


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "--ranks", "4", "--tokens", "99"), ("plan", "--help")])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_ends_first_is_no_fault(arguments: tuple[str, ...], buffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "leetdist.launch", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": buffered},
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-30])
def test_a_temperature_that_overflows_takes_the_likeliest(temperature: float) -> None:
    low = torch.tensor([[-3.0, -1.0, -2.0, -torch.inf]])
    for logits in (low, low + 9, low.bfloat16()):
        assert int(generate._draw(logits, temperature, 0, torch.Generator())) == 1


@pytest.mark.parametrize(
    ("vocabulary", "about", "more", "rank", "words"),
    [
        (256, {"tokenizer": "a/name"}, (), 0, "its tokens are not bytes, it was trained with --tokenizer a/name"),
        (64, {}, (), 0, "the prompt has token 120, and the model knows 64: give its own --tokenizer"),
        (256, {}, SAVED, 0, "path must be the name of a file in a folder"),
        (64, {}, SAVED, 1, "the prompt has token 120"),  # the first rank saves, where the folder may be its host's
    ],
)
def test_generate_says_what_is_wrong_before_it_begins(
    vocabulary: int, about: dict[str, str], more: tuple[str, ...], rank: int, words: str, tmp_path: Path
) -> None:
    weights = LanguageModel(Config.preset("mini", vocabulary)).state_dict()
    write_atomically(tmp_path, 1, lambda folder: save_file(weights, folder / "model.safetensors"), about=about)
    options = COMMANDS["generate"].parser().parse_args(["--model", str(tmp_path), "--prompt", "x", *more])
    with pytest.raises(SystemExit, match=words):
        generate.run(options, Rank(rank, 1, torch.device("cpu"), "gloo"))


def test_another_number_of_ranks_than_the_launchers_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, as all that a parser refuses: test_launch_train.py's test_what_is_wrong_is_said_once."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "argument --ranks: 3, and the launcher started 2 processes" in refused(capsys, "verify", "--ranks", "3")


def test_options_of_ours_are_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    """--virtual is the beginning of two of its own."""
    seen = []
    monkeypatch.setattr(run, "main", lambda argv: seen.append(run.get_args_parser().parse_args(argv)))
    assert ranks.start(2, ["verify", "--virtual", "2"]) == 0
    assert seen[0].module
    assert (seen[0].training_script, seen[0].training_script_args) == ("leetdist.launch", ["verify", "--virtual", "2"])


def test_json_of_each_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.main(["--ranks", "4", "--tokens", "65536", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in found["strong"]] == [1, 2, 4]
    assert found["strong"][2]["forward_ms"] < found["strong"][0]["forward_ms"]
    assert plan.main(["--ranks", "4", "--tokens", "65536"]) == 0
    cell = f"{found['weak'][1]['both_ms']:.3f}"
    assert cell in capsys.readouterr().out

    assert doctor.main(["--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"

    few = [case for number, case in enumerate(entry_cases()) if number in (1, 7)]
    monkeypatch.setattr("leetdist.launch.verify.standard_cases", lambda *_, **__: few)
    from leetdist.launch import verify

    assert verify.main(["--virtual", "3", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["equal"], len(found["cases"])) == (3, True, 2)
    monkeypatch.setattr("leetdist.launch.verify.check", lambda *_: ["o differs"])
    assert verify.main(["--virtual", "2", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"]
    assert found["cases"][0]["differences"] == ["o differs", "o differs"]


def entry_cases() -> list[Any]:
    from leetdist.testing.equality import standard_cases

    return standard_cases(torch.device("cpu"))


def test_bench_times_what_is_right_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "COPIED", 1 << 16)
    options = ["--device", "cpu", "--tokens", "600", "--heads", "2", "--dim", "16", "--repeat", "3"]
    assert bench.main([*options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["call"] for row in rows] == ["forward", "forward + backward", "step of decoding"]
    assert all(0 < row["error"] < 1e-5 and row["milliseconds"] > 0 for row in rows)

    right = bench.leetdist.linear_attention
    monkeypatch.setattr(bench.leetdist, "linear_attention", lambda *given, **options: 1.01 * right(*given, **options))
    assert bench.main(options) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["WRONG" in line for line in lines[-3:]] == [True, True, False]


def test_the_next_command_is_one_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda _: str(python.with_name("leetdist")))
    assert command() == "leetdist"
    for elsewhere in (None, "/somebody/elses/bin/leetdist"):
        monkeypatch.setattr("shutil.which", lambda _, found=elsewhere: found)
        assert command() == "venv/bin/python -m leetdist.launch"


def test_the_losses_are_drawn() -> None:
    assert demo.drawn([4.0, 2.0, 0.0]) == "█▄ "
    assert len(demo.drawn([1.0] * 1000)) == 40


def test_a_parser_takes_no_shortened_options() -> None:
    parser = Arguments("x", "What it is.", "leetdist x")
    parser.add_argument("--everything", action="store_true", help="all of it")
    with pytest.raises(SystemExit):
        parser.parse_args(["--every"])
