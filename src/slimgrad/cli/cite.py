"""Print the BibTeX entries of the methods you used."""

from __future__ import annotations

import json

import click

from slimgrad.catalogue import bibtex, everything, find_anything


@click.command()
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the entries as JSON, by method.")
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Print the papers of the methods NAMES as BibTeX; of all methods without a name."""
    chosen = {name: find_anything(name) for name in names} if names else everything()
    entries = {name: bibtex(found) for name, found in chosen.items()}
    if as_json:
        click.echo(json.dumps(entries, indent=2))
    else:
        click.echo("\n\n".join(dict.fromkeys(entries.values())))
