"""A profile as a table of plain text, for terminals and logs."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from slimgrad.measuring.profile import ModuleCost, Profile
from slimgrad.types import format_bytes, format_seconds

_WIDTH = 110
_MOST_ROWS = 16


def as_text(*renderables: object) -> str:
    """Rich tables and lines as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, no_color=True, highlight=False, markup=False)
    for renderable in renderables:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def columns_table(profile: Profile) -> Table:
    """Bytes by column: the highest each reaches, and what it holds when the step peaks."""
    table = Table(title="Where the memory goes in plain training", title_justify="left", box=None)
    table.add_column("column")
    for name in ("at the peak", "highest"):
        table.add_column(name, justify="right")
    at_peak = profile.timeline.at_peak()
    for column, highest in profile.columns.items():
        name = column.value.replace("_", " ")
        table.add_row(name, format_bytes(at_peak[column]), format_bytes(highest))
    table.add_row("peak", format_bytes(profile.peak_bytes), "")
    return table


def modules_table(profile: Profile) -> Table:
    """One row a block; runs of equal neighbours are drawn together."""
    table = Table(title="By block", title_justify="left", box=None)
    for name in ("block", "class"):
        table.add_column(name, overflow="fold")
    for name in ("weights", "saved for backward", "forward", "backward"):
        table.add_column(name, justify="right")
    runs = _runs(profile.modules)
    for first, last, count in runs[:_MOST_ROWS]:
        each = f" (each of {count})" if count > 1 else ""
        where = first.path if count == 1 else f"{first.path} ... {last.path}{each}"
        table.add_row(
            where,
            first.cls,
            format_bytes(first.weight_bytes),
            format_bytes(first.activation_bytes),
            format_seconds(first.forward_s),
            format_seconds(first.backward_s),
        )
    if len(runs) > _MOST_ROWS:
        table.add_row(f"... and {len(runs) - _MOST_ROWS} more (see --json)", "", "", "", "", "")
    return table


def _runs(rows: list[ModuleCost]) -> list[tuple[ModuleCost, ModuleCost, int]]:
    runs: list[tuple[ModuleCost, ModuleCost, int]] = []
    for row in rows:
        if runs and _alike(runs[-1][1], row):
            runs[-1] = (runs[-1][0], row, runs[-1][2] + 1)
        else:
            runs.append((row, row, 1))
    return runs


def _alike(a: ModuleCost, b: ModuleCost) -> bool:
    same = (a.cls, a.weight_bytes) == (b.cls, b.weight_bytes)
    return same and abs(a.activation_bytes - b.activation_bytes) <= 0.01 * max(
        a.activation_bytes, 1
    )


def profile_table(profile: Profile) -> str:
    """The profile as text: columns, blocks, times."""
    shape = (
        f"one step: {format_seconds(profile.seconds)} (forward {format_seconds(profile.forward_s)}, backward "
        f"{format_seconds(profile.backward_s)}, update {format_seconds(profile.update_s)}), "
        f"{profile.rates.flops_per_s / 1e9:.0f} GFLOP/s, {profile.rates.bytes_per_s / 1e9:.1f} GB/s"
    )
    return as_text(columns_table(profile), "", modules_table(profile), "", shape)
