"""What ``slimgrad bench`` shows: progress on standard error, tables or JSON lines on standard output."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop

import click
import torch
from rich.console import Console

from slimgrad.comparing.contest import BUDGETS, Contest, run
from slimgrad.comparing.peers import chosen_peers
from slimgrad.comparing.plot import save_png
from slimgrad.comparing.report import save_html
from slimgrad.comparing.rows import Row, by_model, save_rows, to_json
from slimgrad.comparing.table import contenders_table, duels_table, predictions_table
from slimgrad.comparing.verdict import duels, prediction
from slimgrad.comparing.zoo import ZOO
from slimgrad.errors import UnsupportedError

_WIDTH = 160  # of tables that go to a file


def run_and_print(options: dict[str, Any]) -> None:
    """Run the comparison that the options ask for; print and save what it found."""
    contest = _contest(options)
    out, begin = options["out"], time.perf_counter()

    def say(line: str) -> None:
        click.echo(f"[{time.perf_counter() - begin:6.0f} s] {line}", err=True)

    rows: list[Row] = []
    for found in run(contest, say):
        rows += found
        save_rows(rows, out / "frontier.jsonl")
        if options["as_json"]:
            for row in found:
                click.echo(to_json(row))
    if not options["as_json"]:
        _print_tables(rows)
    say(f"rows: {out / 'frontier.jsonl'}")
    say(f"page: {save_html(rows, out / 'frontier.html')}")
    try:
        say(f"plot: {save_png(rows, out / 'frontier.png')}")
    except UnsupportedError as error:
        say(f"no plot: {error}")


def _contest(options: dict[str, Any]) -> Contest:
    models, budgets = _names(options["models"]), _names(options["budgets"])
    return Contest(
        models=list(ZOO) if models is None else models,
        peers=chosen_peers(_names(options["peers"]), compiled=options["compiled"]),
        budgets=BUDGETS if budgets is None else budgets,
        rounds=options["rounds"],
        steps=options["steps"],
        size=options["size"],
        compile_limit_s=options["compile_limit"],
        allow_compile=options["compiled"],
        error=options["error"],
        device=_device(options["device"]),
    )


def _names(text: str | None) -> list[str] | None:
    """The names between commas; None where nothing was said, an empty list for "none"."""
    if text is None:
        return None
    return [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UnsupportedError(
            f"no device {name!r} here: expected 'cpu', or 'cuda' where there is one"
        )
    return torch.device(name)


def _print_tables(rows: list[Row]) -> None:
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(width=width, highlight=False, markup=False)
    predictions = [found for group in by_model(rows).values() if (found := prediction(group))]
    for model, group in by_model(rows).items():
        console.print(contenders_table(model, group), "")
        if fought := duels(group):
            console.print(duels_table(model, fought), "")
    if predictions:
        console.print(predictions_table(predictions))
