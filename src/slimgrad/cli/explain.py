"""Explain one method: formula, memory, exactness, limits and references."""

from __future__ import annotations

import json
import textwrap

import click
from rich.console import Console

from slimgrad.catalogue import describe, find_anything, offered_to

_PARTS = {
    "formula": "Formula",
    "memory": "Memory",
    "exactness_text": "Exactness",
    "limits": "Limits",
    "references": "References",
}


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
def command(name: str, as_json: bool) -> None:
    """Show the card of the method or layer NAME, with its hyperparameters and its paper."""
    method = describe(find_anything(name))
    if as_json:
        click.echo(json.dumps(method, indent=2, default=str))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(method["name"], style="bold")
    console.print(method["summary"])
    console.print(
        f"\nsaves {method['column'].replace('_', ' ')}; {method['exactness']}; {offered_to(method)}"
    )
    for key, title in _PARTS.items():
        console.print(f"\n{title}", style="bold")
        console.print(textwrap.indent(method[key], "  "))
    if method["usage"]:
        console.print("\nUse", style="bold")
        console.print(textwrap.indent(method["usage"], "  "))
    if method["fields"]:
        console.print("\nHyperparameters", style="bold")
        for field, value in method["fields"].items():
            console.print(f"  {field} = {value!r}")
    paper = method["paper"]
    console.print("\nPaper", style="bold")
    console.print(f"  {paper['authors']} ({paper['year']}). {paper['title']}. {paper['link']}")
