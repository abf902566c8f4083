"""Compare slimgrad with other ways to train in less memory, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group()
def command() -> None:
    """Compare slimgrad with other ways to train in less memory, on this machine. Each takes --json."""


@command.command()
@click.option("--models", help="Names of models, with commas between; default: all.")
@click.option(
    "--budgets", help="slimgrad's, with commas between; default: seven from 100% of plain to min."
)
@click.option("--peers", help="Names of peers, with commas between; default: all. 'none' for none.")
@click.option(
    "--error",
    default=0.0,
    type=click.FloatRange(0, 1, max_open=True),
    help="Above 0: for each budget a second plan that may change the gradient by this share of its norm.",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--steps", default=1, show_default=True, type=click.IntRange(min=1), help="Timed steps a turn."
)
@click.option("--compile/--no-compile", "compiled", default=True, help="With torch.compile or not.")
@click.option(
    "--compile-limit",
    default=300.0,
    show_default=True,
    help="Seconds after which compiling one model is given up.",
)
@click.option("--size", type=click.Choice(["small", "normal"]), default="normal", show_default=True)
@click.option("--device", help="cpu or cuda; default: cuda where there is one.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/frontier"), show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a row.")
def frontier(**options: Any) -> None:
    """Time against peak of slimgrad and its peers, measured in turns in one run.

    Writes frontier.jsonl, frontier.html and, where matplotlib is installed, frontier.png to --out. Rows of a
    model are written when it is done. What fails is a row that says why.
    """
    from slimgrad.cli.bench_output import run_and_print

    run_and_print(options)
