"""List every method: what it saves, how exact it is, and its paper."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from slimgrad.catalogue import components, describe, everything, methods


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the catalogue as JSON.")
def command(as_json: bool) -> None:
    """List every method: the bytes it saves, its rung of exactness, who uses it, its summary and its paper.

    Plans choose from the methods offered to blocks, rows of blocks or the model; the others are layers and functions
    for your code.
    """
    described = [describe(found) for found in everything().values()]
    if as_json:
        click.echo(json.dumps(described, indent=2, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "saves", "exactness", "for", "what it does", "paper"):
        table.add_column(name, overflow="fold")
    for method in described:
        paper = method["paper"]
        table.add_row(
            method["name"],
            method["column"].replace("_", " "),
            method["exactness"],
            method["scope"],
            method["summary"],
            f"{paper['title']} ({paper['year']})",
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"\n{len(methods())} methods that plans choose from, {len(components())} for your code; "
        "'slimgrad explain NAME' shows a card."
    )
