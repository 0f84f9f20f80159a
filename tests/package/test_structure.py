"""The tree is what it seems: imports go down, never in a circle; files are short; documents point to what is there."""

from __future__ import annotations

import ast
import pydoc
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What may import what: each part of the package, and those below it that it knows. (Tests and benchmarks know all.)
KNOWS = {
    "kernels.runtime": (),
    "kernels.common": ("kernels.runtime",),
    "kernels.constant_decay": ("kernels.runtime", "kernels.common"),
    "kernels.token_decay": ("kernels.runtime", "kernels.common", "kernels.constant_decay"),
    "kernels.mamba": ("kernels.runtime", "kernels.common", "kernels.token_decay"),
    "arguments": (),
    "sequence": ("arguments", "kernels.runtime", "kernels.common"),
    "operators": ("arguments", "kernels", "sequence"),
    "engine": ("arguments", "kernels.runtime", "kernels.common", "sequence", "operators"),
    "api": ("arguments", "kernels", "sequence", "operators", "engine"),
    "decoder": ("operators", "engine", "api"),
    "explain": ("kernels.runtime", "sequence", "operators", "engine"),
    "inference": ("arguments", "kernels", "sequence", "operators", "engine", "api"),
    "reference": (),
    "mesh": ("arguments", "sequence"),
    "mamba": ("arguments", "kernels", "sequence", "operators", "engine", "api"),
    "nn": ("arguments", "kernels", "sequence", "operators", "api", "mamba", "inference"),
    "integrations": ("arguments", "sequence", "engine", "api", "inference", "mamba", "mesh", "nn"),
    "testing": ("sequence", "api", "inference"),
    # leetdist itself: the public names
    "": ("sequence", "api", "decoder", "explain", "inference", "reference", "mamba", "mesh", "nn", "integrations"),
    "launch": (
        "",
        "kernels",
        "reference",
        "sequence",
        "operators",
        "engine",
        "inference",
        "nn",
        "integrations",
        "testing",
    ),
}
MOST_LINES = 400


def modules() -> dict[str, Path]:
    """Every module of the package by its name without "leetdist"; kernels and launch lie beside it in the checkout."""
    found = {}
    for folder in ("leetdist", "kernels", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).parts
            if inside[:2] in (("leetdist", "kernels"), ("leetdist", "launch")):  # the links
                continue
            parts = [*inside[folder == "leetdist" : -1], path.stem]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> list[str]:
    """Dotted names that a file imports: at its head, in a function, for its types only, or in quotes."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += re.findall(r"^leetdist(?:\.\w+)+(?<!\.json)$", node.value)
    return names


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports."""
    known = modules()

    def module_of(name: str) -> str | None:
        """The module that a dotted name is, or is in."""
        package, *parts = name.split(".")
        while ".".join(parts) not in known:
            parts.pop()
        return ".".join(parts) if package == "leetdist" else None

    return {
        module: {other for name in imported(path) if (other := module_of(name)) is not None} - {module}
        for module, path in known.items()
    }


def part_of(module: str) -> str:
    """The part of the package that a module belongs to."""
    return max((part for part in KNOWS if part and f"{module}.".startswith(f"{part}.")), key=len, default="")


def named(part: str, names: tuple[str, ...]) -> bool:
    """Whether a part, or a folder that it is in, is among the names."""
    return part in names or any(name and part.startswith(f"{name}.") for name in names)


def test_every_part_has_its_place() -> None:
    """The table speaks of what there is, and goes from the ground up."""
    assert {part_of(module) for module in modules()} == set(KNOWS)
    above = list(KNOWS)
    for part, below in KNOWS.items():
        assert not [other for other in above if named(other, below)], f"{part or 'leetdist'} stands below"
        above.remove(part)


@pytest.mark.parametrize("part", KNOWS)
def test_imports_go_down(part: str) -> None:
    wrong = [
        f"{module or 'leetdist'} imports {other or 'leetdist'}"
        for module, others in imports().items()
        for other in others
        if part_of(module) == part != part_of(other) and not named(part_of(other), KNOWS[part])
    ]
    assert not wrong


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing that is left are taken away, again and again."""
    left = dict(graph)
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    return set(left)


def test_no_circles() -> None:
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
    assert not in_circles(imports())


def test_no_circles_in_benchmarks() -> None:
    folder = ROOT / "benchmarks"
    files = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    graph = {
        module: {x for name in imported(path) for x in (name, name.rpartition(".")[0]) if x in files} - {module}
        for module, path in files.items()
    }
    assert graph["common.measure"] >= {"common.cases", "common.contestants"}
    assert not in_circles(graph)


def foreign(text: str) -> set[str]:
    """Private names of other modules of the package that a module imports, or reads from what it imports."""
    tree, found, imported_names = ast.parse(text), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("leetdist."):
            for alias in node.names:
                imported_names[alias.asname or alias.name] = alias.name
    found |= {name for name in imported_names.values() if name.startswith("_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported_names:
            found |= {f"{node.value.id}.{node.attr}"} if re.match(r"_(?!_)", node.attr) else set()
    return found


def test_private_names_stay_at_home() -> None:
    assert foreign("from leetdist.engine import plan\nfrom leetdist.api import _x, y\nplan._z, plan.z, self._z") == {
        "_x",
        "plan._z",
    }
    wrong = {name: found for name, path in modules().items() if (found := foreign(path.read_text()))}
    assert not wrong


def test_contributing_lists_every_folder() -> None:
    """Each folder of the package's modules, from the top down as they import each other, with a file that is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = []
    for folders, file in re.findall(r"^\| ([\w/, ]+) \| .* \| ([\w/]+\.py) \|$", text, re.MULTILINE):
        first, *others = folders.split(", ")
        for folder in (first, *(f"{first.rpartition('/')[0]}/{other}" for other in others)):
            assert (ROOT / folder / file).is_file(), (folder, file)
            listed.append(folder.removeprefix("leetdist/").replace("/", "."))
    listed.remove("leetdist")  # files, not a folder of some
    assert listed == [part for part in reversed(KNOWS) if any(module.startswith(f"{part}.") for module in modules())]


@pytest.mark.parametrize("folder", ["engine", "inference", "integrations", "operators", "sequence", "kernels.runtime"])
def test_every_module_is_said_of_its_folder(folder: str) -> None:
    """What a newcomer reads first names all that is in it."""
    at = ROOT / "CONTRIBUTING.md" if folder.startswith("kernels") else modules()[folder]
    said = set(re.findall(r"\w+", at.read_text()))
    here = {module.removeprefix(f"{folder}.").split(".")[0] for module in modules() if module.startswith(f"{folder}.")}
    assert here
    assert not here - said


def sources() -> list[Path]:
    folders = ("leetdist", "kernels", "launch", "benchmarks", "tests")
    kinds = (".py", ".cu", ".cuh", ".cpp", ".h", ".sh")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in sources() if (n := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def documents() -> list[Path]:
    folders = ("leetdist", "kernels", "launch", "benchmarks", "docs", "tests")
    return [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]


def pointed_at(text: str) -> set[str]:
    """Links, and what is written like a file of the repository."""
    folders = "leetdist|kernels|launch|benchmarks|tests|docs|findings"
    written = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w\.\w+)", text)
    return {*re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text), *written}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_point_to_what_is_there(document: Path) -> None:
    missing = [
        name
        for name in pointed_at(document.read_text())
        if not any((at / name).exists() for at in (ROOT, document.parent))
    ]
    assert not missing


def test_source_points_to_what_is_there() -> None:
    """Comments and docstrings name files that there are (but for results, which they may be about to write)."""
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources()
        for name in pointed_at(path.read_text())
        if re.fullmatch(r"[\w./-]+\.(py|md|sh|cuh?)", name) and not (ROOT / name).exists()
    }
    assert not missing


def test_names_of_the_documents() -> None:
    """Every dotted name of leetdist's, in backticks, is one."""
    for document in documents():
        for name in re.findall(r"`(leetdist(?:\.\w+)+)[`(]", document.read_text()):
            assert pydoc.locate(name) is not None, f"{document}: {name}"


def test_names_of_the_source() -> None:
    """Every dotted name of leetdist's, in code, comments and docstrings, is a module, a folder of some, or in one."""
    known = modules()
    for path in known.values():
        for name in re.findall(r"(?<![\w./-])leetdist\.((?:\w+\.)*\w+)\b(?<!json)(?!/)", path.read_text()):
            if not any(f"{module}.".startswith(f"{name}.") for module in known):
                module = max((x for x in known if not x or name.startswith(f"{x}.")), key=len)
                first = name.removeprefix(module).strip(".").partition(".")[0]
                assert re.search(rf"\b{first}\b", known[module].read_text()), f"{path.relative_to(ROOT)}: {name}"


def test_findings_are_listed() -> None:
    """Every script has its line, and says at its head what one would guess and what is so."""
    listed = re.findall(r"^\| \[(\w+\.sh)\]\(\1\)", (ROOT / "findings" / "README.md").read_text(), re.MULTILINE)
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    assert sorted(listed) == [path.name for path in scripts]
    for path in scripts:
        assert re.search(r"^# One would guess: .*\n(# .*\n)*# It is so that: ", path.read_text(), re.MULTILINE), (
            path.name
        )


def test_no_comprehension_has_a_name_of_its_module() -> None:
    """Python 3.12 takes a function, read in one comprehension, for the name of another one beside it."""
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        own = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        own |= {alias.asname or alias.name for node in imports for alias in node.names}
        targets = [node.target for node in ast.walk(tree) if isinstance(node, ast.comprehension)]
        named = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        assert not own & named, (name, own & named)
