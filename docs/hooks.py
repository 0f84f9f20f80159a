"""What mkdocs does to the pages beside rendering them (mkdocs.yml names this file).

The same pages are read in the repository, where links to its files outside of docs/ lead somewhere. They do in the site
too while it lies in the repository (site/ is beside docs/, and pages are files); mkdocs, which knows docs/ alone, would
call them broken. So they are looked up here, and handed on as HTML. Pictures from outside are taken into the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

LINK = re.compile(r"(!?)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ ]*$|`[^`\n]+`(?!\]))", re.MULTILINE | re.DOTALL)
TABLE = "<!-- model table -->"


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any, **_: Any) -> str:
    docs = Path(config["docs_dir"]).resolve()
    folder = Path(page.file.abs_src_path).resolve().parent

    def link(found: re.Match[str]) -> str:
        picture, words, path, anchor = found.groups()
        target = (folder / path).resolve()
        if target.is_relative_to(docs):
            return found.group()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: a link to {path}, which is not there")
        if picture:
            inside = f"pictures/measured/{target.name}"
            if files.get_file_from_path(inside) is None:
                files.append(File.generated(config, inside, abs_src_path=str(target)))
            return f"![{words}]({posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or '.')})"
        words = re.sub("`([^`]+)`", r"<code>\1</code>", words)
        return f'<a href="{path}{anchor or ""}">{words}</a>'

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts).replace(TABLE, model_table(docs.parent / "tests" / "integrations" / "model_table.txt"))


def model_table(path: Path) -> str:
    """tests/integrations/model_table.txt as a table of Markdown, each family that is served alike in one line."""
    head, what, _, columns, *lines = path.read_text().splitlines()
    names = columns.split()
    served: dict[str, None] = {}
    others = []
    for line in lines[: lines.index("")]:
        model, *results = line.split(maxsplit=len(names) + 1)
        if results[: len(names)] == ["exact"] * len(names):
            served[model] = None  # some are there in several configurations
        else:
            why = results[len(names)] if len(results) > len(names) else ""
            others.append((model, results[: len(names)], why))
    rows = [
        f"| {model} | {' / '.join(dict.fromkeys(results))} | {why.replace('|', chr(92) + '|')} |"
        for model, results, why in others
    ]
    return "\n".join(
        [
            f"({head.split(', ', 1)[1]}; {what})\n",
            f"**Exact in {', '.join(names[:-1])} and {names[-1]}** ({len(served)} classes): " + ", ".join(served),
            "\nThe others:\n",
            "| model | result | why |",
            "|---|---|---|",
            *rows,
        ]
    )
