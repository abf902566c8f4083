"""Show what this machine offers: versions, memory and its limits, disk, compiler, devices, extras."""

from __future__ import annotations

import dataclasses
import json

import click
from rich.console import Console
from rich.table import Table

from slimgrad.measuring.machine import Machine, this_machine
from slimgrad.types import format_bytes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def command(as_json: bool) -> None:
    """Show what slimgrad finds on this machine, and which optional packages would enable what."""
    machine = this_machine()
    if as_json:
        facts = {**dataclasses.asdict(machine), "usable_bytes": machine.usable_bytes}
        click.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False, markup=False)
    console.print(_facts(machine))
    console.print("\noptional packages", style="bold")
    console.print(_extras(machine))


def _facts(machine: Machine) -> Table:
    limit = machine.cgroup_limit_bytes
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("python", f"{machine.python} on {machine.system}")
    for name, version in machine.versions.items():
        table.add_row(name, version or "not installed")
    table.add_row("processor", machine.processor)
    table.add_row("threads", f"{machine.num_threads} of {machine.num_cores} cores")
    table.add_row("memory", f"{format_bytes(machine.memory_bytes)}")
    table.add_row("cgroup limit", "none" if limit is None else format_bytes(limit))
    table.add_row("usable now", f"{format_bytes(machine.usable_bytes)}")
    free = format_bytes(machine.temporary_free_bytes)
    table.add_row("offload folder", f"{machine.temporary_folder}, {free} free")
    table.add_row("compiler", machine.compiler or "none found: torch.compile will not work")
    table.add_row("CUDA devices", "; ".join(machine.cuda_devices) or "none")
    table.add_row("colours", "off (NO_COLOR)" if machine.no_color else "on where the terminal can")
    return table


def _extras(machine: Machine) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for extra in machine.extras:
        table.add_row("✓" if extra.present else "–", extra.name, extra.enables)
    return table
