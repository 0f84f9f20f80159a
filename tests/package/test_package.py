"""The wheel holds every file of the source tree, importing it is light, and its docs are true."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import leetdist

ROOT = Path(__file__).resolve().parents[2]
# Folder of the checkout -> where it installs. The two links stay out of the first walk.
FOLDERS = {"leetdist": "leetdist", "kernels": "leetdist/kernels", "launch": "leetdist/launch"}
# What nobody should have to install, or wait for, to import leetdist.
LAZY = ("accelerate", "cuda", "deepspeed", "fla", "matplotlib", "rich", "transformers", "triton")


def source_files() -> set[str]:
    """What has to be in the wheel: everything but notes, so that no kind of data is forgotten."""
    found: set[str] = set()
    for folder, installed in FOLDERS.items():
        for path, folders, names in os.walk(ROOT / folder, followlinks=False):
            folders[:] = [name for name in folders if name != "__pycache__"]
            below = Path(installed, Path(path).relative_to(ROOT / folder))
            found.update(str(below / name) for name in names if not name.endswith((".md", ".pyc", "~")))
    return found


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: a build leaves files behind, and the next wheel would take them up."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for pattern in ("pyproject.toml", "LICENSE*", "README*"):
        for file in ROOT.glob(pattern):
            shutil.copy2(file, copy)
    return copy


def build(checkout: Path, out: Path, *options: str) -> Path:
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out)
    run(*command, *options, checkout, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def package_files(wheel: Path) -> set[str]:
    return {name for name in contents(wheel) if ".dist-info/" not in name}


def test_links_are_relative() -> None:
    for name in ("kernels", "launch"):
        link = ROOT / "leetdist" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_kernels_shadows_nothing() -> None:
    """With an __init__.py, `import kernels` in the root would find ours, also in transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_is_the_source_tree(wheel: Path) -> None:
    assert package_files(wheel) == source_files()


def test_wheel_has_one_package_and_the_licence(wheel: Path) -> None:
    files = contents(wheel)
    (metadata,) = {name.split("/")[0] for name in files} - {"leetdist"}
    assert re.fullmatch(r"leetdist-[\w.]+\.dist-info", metadata)
    assert f"{metadata}/licenses/LICENSE" in files
    assert "leetdist/py.typed" in files
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"{metadata}/METADATA").decode().splitlines()
    assert "License-Expression: Apache-2.0" in lines
    required = [line for line in lines if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.9"]


def test_wheel_built_from_sdist_is_the_same_and_both_can_be_uploaded(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    assert contents(build(checkout, tmp_path)) == contents(wheel)
    pytest.importorskip("twine")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *tmp_path.iterdir(), cwd=tmp_path)
    assert said.count("PASSED") == 2


def test_the_command_is_installed_and_runs_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "bin" / "leetdist", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert said == f"leetdist {leetdist.__version__}\n"
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "leetdist = leetdist.launch.__main__:main" in entry.read_text()


def test_metadata_names_no_place_that_is_not_there(wheel: Path) -> None:
    """Nothing is published yet, so there is no URL to name."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        head = archive.read(name).decode().partition("\n\n")[0]
    assert "Home-page:" not in head
    assert "Project-URL:" not in head


@pytest.mark.parametrize("minor", [10, 12, 13, 14])
def test_every_python_that_is_named_parses_it(minor: int) -> None:
    """What pyproject.toml admits, where there is such an interpreter; ruff and mypy take the code as the oldest's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python3.{minor}"), *pyenv.glob(f"versions/3.{minor}.*/bin/python")]
    works = [path for path in found if path and not subprocess.run([path, "-V"], capture_output=True).returncode]
    if not works:
        pytest.skip(f"no Python 3.{minor} on this machine")
    script = "import sys\nfor path in sys.argv[1:]: compile(open(path, encoding='utf-8').read(), path, 'exec')"
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    run(works[0], "-W", "error", "-c", script, *paths, cwd=ROOT)


def test_the_oldest_python_is_the_same_everywhere() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', text, re.MULTILINE)
    assert f'python_version = "{oldest}"' in text  # of mypy
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert workflow["jobs"]["package"]["strategy"]["matrix"]["python"] == named
    assert named[0] == oldest
    assert any("tests/run.sh" in step.get("run", "") for step in workflow["jobs"]["everything"]["steps"])


def test_citation_and_changelog_are_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["version"] == leetdist.__version__
    assert cited["license"] == "Apache-2.0"
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert leetdist.__version__ in changes
    kinds = re.findall(r"^### (.*)$", changes, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_import_is_light(installed: Path, tmp_path: Path) -> None:
    """Nothing optional is imported, no device or process group touched, no setting changed."""
    script = f"""
import sys
import torch, torch.distributed
before = set(sys.modules)
state = lambda: (
    torch.get_default_dtype(),
    torch.get_num_threads(),
    torch.get_float32_matmul_precision(),
    torch.are_deterministic_algorithms_enabled(),
    torch.random.get_rng_state().tolist(),
)
settings = state()
import leetdist
for name in leetdist.__all__:
    getattr(leetdist, name)
print("at", leetdist.__file__)
imported = {{name.split(".")[0] for name in set(sys.modules) - before}}
print("optional", sorted(imported.intersection({LAZY!r})))
print("unchanged", settings == state())
print("cuda", torch.cuda.is_initialized())
print("group", torch.distributed.is_available() and torch.distributed.is_initialized())
"""
    out = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.splitlines() == [
        f"at {installed / 'leetdist' / '__init__.py'}",
        "optional []",
        "unchanged True",
        "cuda False",
        "group False",
    ]
    assert list(tmp_path.iterdir()) == []


def test_pins_agree() -> None:
    """pre-commit runs what the dev extra pins, CI what tests/requirements.txt pins."""
    pinned = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    (dev,) = re.findall(r"^dev = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    tools = re.findall(r'"([\w-]+==[^"]+)"', dev)
    assert len(tools) == 2
    assert set(tools) <= set(pinned)


PUBLIC = [
    name
    for name in leetdist.__all__
    if callable(value := getattr(leetdist, name)) and not (inspect.isclass(value) and issubclass(value, BaseException))
]


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(
    ("part", "pattern"),
    [
        ("shapes", r"\((\w+, )+\w*\)|[Ss]hape"),
        ("dtypes or units", r"\b(dtype|fp32|float32|seconds|tokens|bytes|[Nn]atural log)"),
        ("errors", r"\bRaises\b"),
        ("its source", r"\bSources?\b|\barXiv\b"),
        ("an example", r">>> "),
    ],
)
def test_docstring_tells(name: str, part: str, pattern: str) -> None:
    doc = inspect.getdoc(getattr(leetdist, name)) or ""
    assert re.search(pattern, doc), f"the docstring of leetdist.{name} lacks {part}"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_examples_run(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    report: list[str] = []
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = finder.find(getattr(leetdist, name), name, globs={"leetdist": leetdist, "torch": torch})
    assert examples, f"leetdist.{name} has no example"
    for example in examples:
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
