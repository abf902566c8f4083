"""What the tools have in common that write a page of the documentation from results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


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
