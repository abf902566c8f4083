"""List every method: what it saves, how exact it is, and its paper."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from slimgrad.catalogue import describe, methods


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the catalogue as JSON.")
def command(as_json: bool) -> None:
    """List every method: the bytes it saves, its rung of exactness, its summary and its paper."""
    described = [describe(cls) for cls in methods().values()]
    if as_json:
        click.echo(json.dumps(described, indent=2, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "saves", "exactness", "what it does", "paper"):
        table.add_column(name, overflow="fold")
    for method in described:
        paper = method["paper"]
        table.add_row(
            method["name"],
            method["column"].replace("_", " "),
            method["exactness"],
            method["summary"],
            f"{paper['title']} ({paper['year']})",
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"\n{len(described)} methods; 'slimgrad explain NAME' shows a method's card.")
