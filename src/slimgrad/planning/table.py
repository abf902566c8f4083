"""A plan as a table of plain text: what is done where, what it frees, what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from slimgrad.measuring.table import as_text
from slimgrad.planning.plan import Choice, Plan
from slimgrad.types import format_bytes, format_seconds


def plan_table(plan: Plan) -> str:
    """The plan as text, equal choices on neighbouring blocks drawn together."""
    table = Table(title=_title(plan), title_justify="left", box=None)
    for name in ("method", "where"):
        table.add_column(name, overflow="fold")
    table.add_column("frees", justify="right")
    table.add_column("adds", justify="right")
    table.add_column("note", overflow="fold")
    for run in grouped(plan.choices):
        table.add_row(run[0].method, where(run), _freed(run), _added(run), run[0].note)
    if not plan.choices:
        table.add_row("(none)", "plain training fits", "", "", "")
    lines: list[object] = [table, "", _predicted(plan)]
    if plan.tightened_bytes:
        lines.append(
            f"planned {format_bytes(plan.tightened_bytes)} below the budget: the first plan's measured peak was "
            "that much above its predicted one"
        )
    if plan.needs_step:
        lines.append(f"needs step(batch): {', '.join(plan.needs_step)}")
    lines += [f"not used: {name}: {reason}" for name, reason in plan.refusals.items()]
    return as_text(*lines)


def grouped(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Choices of one method with one setting, together."""
    runs: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        fields = sorted(
            (n, v)
            for n, v in choice.fields.items()
            if n not in ("blocks", "keep", "move", "storages", "origins")
        )
        runs.setdefault((choice.method, str(fields)), []).append(choice)
    return list(runs.values())


def where(run: Sequence[Choice]) -> str:
    """The blocks of a run of choices, briefly."""
    paths = [path for choice in run for path in choice.blocks]
    if not paths:
        return "the whole step"
    if len(paths) <= 2:
        return ", ".join(paths)
    return f"{len(paths)} blocks: {paths[0]} ... {paths[-1]}"


def _title(plan: Plan) -> str:
    return (
        f"Plan for {plan.budget} ({format_bytes(plan.budget_bytes)}), exactness {plan.exactness.value} "
        f"(loosest used: {plan.loosest.value})"
    )


def _predicted(plan: Plan) -> str:
    share = plan.peak_bytes / plan.plain_peak_bytes if plan.plain_peak_bytes else 0.0
    ratio = plan.seconds / plan.plain_seconds if plan.plain_seconds else 0.0
    return (
        f"predicted peak {format_bytes(plan.peak_bytes)} of plain's {format_bytes(plan.plain_peak_bytes)} "
        f"({share:.0%}); predicted step {format_seconds(plan.seconds)}, {ratio:.2f} of plain's"
        + (f"; error of the gradient {plan.predicted_error:.1%}" if plan.predicted_error else "")
        + ("" if plan.gap is None else f", at most {plan.gap:.1%} above the best possible")
    )


def _freed(run: Sequence[Choice]) -> str:
    total: dict[str, int] = {}
    for choice in run:
        for column, num_bytes in choice.freed.items():
            total[column] = total.get(column, 0) + num_bytes
    return "\n".join(f"{format_bytes(b)} {c.replace('_', ' ')}" for c, b in total.items() if b)


def _added(run: Sequence[Choice]) -> str:
    added = sum(c.added_s for c in run)
    return format_seconds(added) if added else ""
