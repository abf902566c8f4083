"""Write docs/methods/ from the methods' and components' own cards: ``python tools/docs.py [--check]``.

One page a method and one index. With ``--check`` nothing is written: the exit code is 1 and the pages are named
if they differ from what would be written, a page is missing, or one is left of a method that is gone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimgrad.catalogue import bibtex, describe, everything, offered_to

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
NOTE = "<!-- Written by tools/docs.py from the method's docstring: change that, then run `make docs`. -->"
SECTIONS = {
    "Formula": "formula",
    "Memory": "memory",
    "Exactness": "exactness_text",
    "Limits": "limits",
    "References": "references",
}


def page(cls: Callable[..., Any]) -> str:
    """The page of one method, in Markdown."""
    method = describe(cls)
    paper = method["paper"]
    title = f"[{paper['title']}]({paper['link']})" if paper["link"] else paper["title"]
    lines = [
        f"# {method['name']}",
        NOTE,
        method["summary"],
        f"| saves | exactness | use | paper |\n|---|---|---|---|\n"
        f"| {_title(method['column'])} | {method['exactness']} | {offered_to(method)} "
        f"| {paper['authors']} ({paper['year']}), {title} |",
    ]
    for header, key in SECTIONS.items():
        lines += [
            f"## {header}",
            f"```text\n{method[key]}\n```" if header == "Formula" else method[key],
        ]
    if method["usage"]:
        lines += ["## Use", f"```python\n{method['usage']}\n```"]
    lines += ["## Hyperparameters", _fields(method)]
    lines += ["## Cite", f"```bibtex\n{bibtex(cls)}\n```"]
    return "\n\n".join(lines) + "\n"


def index(catalogue: Mapping[str, Callable[..., Any]]) -> str:
    """The table of all methods, in Markdown."""
    rows = ["| method | saves | exactness | for | what it does |", "|---|---|---|---|---|"]
    for name, cls in catalogue.items():
        method = describe(cls)
        rows.append(
            f"| [{name}]({name}.md) | {_title(method['column'])} | {method['exactness']} "
            f"| {method['scope']} | {_cell(method['summary'])} |"
        )
    return "\n\n".join(["# Methods", NOTE, "\n".join(rows)]) + "\n"


def _title(column: str) -> str:
    return column.replace("_", " ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fields(method: Mapping[str, Any]) -> str:
    if not method["fields"]:
        return "None."
    rows = [f"| `{name}` | `{value!r}` |" for name, value in method["fields"].items()]
    return "\n".join(["| field | default |", "|---|---|", *rows])


def pages(catalogue: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Every generated page by file name."""
    return {"index.md": index(catalogue)} | {f"{n}.md": page(cls) for n, cls in catalogue.items()}


def differing(wanted: Mapping[str, str], folder: Path) -> list[str]:
    """Names of files in ``folder`` that are missing, left over or not as wanted."""
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(n for n in {*wanted, *present} if wanted.get(n) != present.get(n))


def write(wanted: Mapping[str, str], folder: Path) -> None:
    """Make ``folder`` hold the wanted pages and no other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in differing(wanted, folder):
        if name in wanted:
            (folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (folder / name).unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: docs/methods")
    options = parser.parse_args(arguments)
    wanted = pages(everything())
    stale = differing(wanted, options.folder)
    if options.check:
        for name in stale:
            print(f"out of date: {options.folder / name}; run 'make docs'", file=sys.stderr)
        return 1 if stale else 0
    write(wanted, options.folder)
    print(f"{len(wanted)} pages, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
