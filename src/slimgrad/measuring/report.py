"""The memory report: plain numbers in, one HTML file out that needs no network.

Everything that comes from outside (names of modules, labels, figures) is escaped; the page's content policy
forbids it to load anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from slimgrad.measuring.picture import Timeline, timeline_svg
from slimgrad.measuring.svg import COLOURS, column_title, element, fill, patterns
from slimgrad.measuring.treemap import ModuleRow, treemap_svg
from slimgrad.types import Column, format_bytes, format_seconds

__all__ = [
    "CodeCell",
    "CodeRow",
    "MemoryReport",
    "ModuleRow",
    "PlanRow",
    "Timeline",
    "render_html",
    "save_html",
    "timeline_svg",
    "treemap_svg",
]


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan: a method, where it is used, the bytes it frees by column and the seconds it adds."""

    method: str
    where: str
    note: str
    freed: Mapping[str, int]
    seconds_added: float


@dataclass(frozen=True)
class CodeCell:
    """One setting of a code on one block: the error of the block's own gradient, and what is told beside it."""

    error: float
    tip: str

    @property
    def heat(self) -> float:
        """How dark the cell is, in percent: 0 from an error of 0.01 % down, 100 from all of the gradient up."""
        return min(100.0, max(0.0, 25 * (4 + math.log10(max(self.error, 1e-9)))))


@dataclass(frozen=True)
class CodeRow:
    """One setting of a code: its name, the error of the whole gradient with it on every block, a cell a block (None: it suits nothing)."""

    name: str
    error: float
    cells: Sequence[CodeCell | None]


@dataclass(frozen=True)
class MemoryReport:
    """What the page shows. ``timelines`` go from before to after; parts left empty are left out.

    ``facts`` are pairs of a name and its text. ``proof`` are checks: a name, a figure, and whether it held
    (None: shown, but nothing was promised). ``code_blocks`` are the blocks of the cells of ``code_rows``.
    """

    title: str
    subtitle: str = ""
    timelines: Sequence[Timeline] = ()
    budget_bytes: int | None = None
    modules: Sequence[ModuleRow] = ()
    plan_rows: Sequence[PlanRow] = ()
    code_rows: Sequence[CodeRow] = ()
    code_blocks: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    proof: Sequence[tuple[str, str, bool | None]] = ()


def render_html(report: MemoryReport) -> str:
    """The page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        bytes=format_bytes, seconds=format_seconds, column=column_title, path=_breakable
    )
    source = resources.files("slimgrad.measuring").joinpath("report.html.j2").read_text("utf-8")
    budget = report.budget_bytes
    timelines = report.timelines
    return environment.from_string(source).render(
        report=report,
        columns=list(Column),
        picture=Markup(timeline_svg(timelines, budget)) if timelines else None,
        treemap=Markup(treemap_svg(report.modules)) if report.modules else None,
        fills=_fills(),
        swatches={column: _swatch(column) for column in COLOURS},
        headline=_headline(timelines, budget),
        freed_columns=[c for c in Column if any(row.freed.get(c) for row in report.plan_rows)],
        modules=sorted(report.modules, key=lambda row: -row.num_bytes),
    )


def save_html(report: MemoryReport, path: str | Path) -> Path:
    """Write the page to ``path``, whose folder is made if need be; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_html(report), encoding="utf-8")
    return path


def _headline(timelines: Sequence[Timeline], budget: int | None) -> list[tuple[str, str, str]]:
    """The figures at the top: a name, a figure and a remark."""
    figures: list[tuple[str, str, str]] = []
    for timeline in timelines:
        remark = ""
        if timeline is not timelines[0] and timelines[0].peak_bytes:
            share = timeline.peak_bytes / timelines[0].peak_bytes
            remark = f"{share:.0%} of {timelines[0].label}"
        figures.append((f"{timeline.label}: peak", format_bytes(timeline.peak_bytes), remark))
    if budget is not None:
        last = timelines[-1] if timelines else None
        spare = budget - last.peak_bytes if last else 0
        remark = (
            f"{format_bytes(abs(spare))} {'to spare' if spare >= 0 else 'over'}" if last else ""
        )
        figures.append(("budget", format_bytes(budget), remark))
    return figures


def _fills() -> Markup:
    """The legend's fills, in a picture of no size: swatches are pictures of their own."""
    return element("svg", patterns("legend"), class_="sg hidden", aria_hidden="true")


def _swatch(column: str) -> Markup:
    """A column's colour and hatch, for the legend. ``_fills`` defines what it is filled with."""
    square = element("rect", width=22, height=14, rx=2, fill=fill("legend", column))
    return element("svg", square, width=22, height=14, class_="sg", aria_hidden="true")


def _breakable(path: str) -> Markup:
    """A dotted path that a browser may break after each dot."""
    return Markup("<wbr>").join(
        Markup.escape(part) + "." if i < path.count(".") else Markup.escape(part)
        for i, part in enumerate(path.split("."))
    )
