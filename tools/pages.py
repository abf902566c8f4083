"""What the tools have in common that write a page of the documentation from results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def asked_to_check(description: str | None, arguments: Sequence[str] | None) -> bool:
    """Whether the command line says ``--check``."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    return parser.parse_args(arguments).check


def is_current(path: Path, text: str) -> bool:
    """Whether the page holds ``text``."""
    return path.exists() and path.read_text(encoding="utf-8") == text


def out_of_date(path: Path) -> int:
    """Say so; returns the exit code."""
    print(f"out of date: {path}; run 'make docs'", file=sys.stderr)
    return 1


def written_or_checked(path: Path, text: str, is_check: bool) -> int:
    """Let the page hold ``text``, or say that it does not; returns the exit code."""
    if is_current(path, text):
        return 0
    if is_check:
        return out_of_date(path)
    path.write_text(text, encoding="utf-8")
    return 0
