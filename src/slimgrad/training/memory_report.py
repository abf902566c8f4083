"""The HTML report of a measurement, a plan or a training run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slimgrad.measuring.ledger import MemoryTimeline
from slimgrad.measuring.profile import ModuleCost, Profile
from slimgrad.measuring.report import (
    CodeCell,
    CodeRow,
    MemoryReport,
    ModuleRow,
    PlanRow,
    Timeline,
    save_html,
)
from slimgrad.method import CodingCost
from slimgrad.planning.plan import Plan
from slimgrad.planning.sensitivity import largest_errors, setting_text
from slimgrad.planning.table import grouped, where
from slimgrad.types import format_bytes, format_seconds

_INSTANTS = 3000


def save_report(
    path: Path,
    title: str,
    profile: Profile | None,
    plan: Plan | None = None,
    *,
    plain: MemoryTimeline | None = None,
    planned: MemoryTimeline | None = None,
    proof: Sequence[tuple[str, str, bool | None]] = (),
) -> Path:
    """Write one offline HTML file. Timelines measured in a run replace the predicted ones."""
    before = plain if plain is not None else (profile.timeline if profile is not None else None)
    after = planned if planned is not None else (plan.timeline if plan is not None else None)
    steps = [("plain", before, plain is None), ("slimgrad", after, planned is None)]
    timelines = [
        drawn(f"{name}, predicted" if predicted else name, timeline)
        for name, timeline, predicted in steps
        if timeline is not None
    ]
    report = MemoryReport(
        title=title,
        subtitle="live tensor bytes over one training step",
        timelines=timelines,
        budget_bytes=plan.budget_bytes if plan is not None else None,
        modules=[_module_row(m, profile) for m in profile.modules] if profile is not None else [],
        plan_rows=_plan_rows(plan) if plan is not None else [],
        facts=_facts(profile, plan),
        proof=proof,
        code_rows=_code_rows(profile) if profile is not None else [],
        code_blocks=list(profile.coding) if profile is not None else [],
    )
    return save_html(report, path)


def drawn(label: str, timeline: MemoryTimeline) -> Timeline:
    """The timeline thinned to what can be seen, the highest instant of each stretch kept."""
    total = timeline.total
    edges = np.linspace(0, total.size, min(_INSTANTS, total.size) + 1).astype(int)
    spans = itertools.pairwise(edges)
    kept = np.array([a + int(total[a:b].argmax()) for a, b in spans if b > a])
    columns = {c.value: live[kept].tolist() for c, live in timeline.columns.items()}
    named = [m for m in timeline.marks if m[1] in ("backward begins", "optimizer")][:4]
    marks = [(int(np.searchsorted(kept, t).clip(0, kept.size - 1)), name) for t, name in named]
    return Timeline(label, columns, marks)


def _module_row(module: ModuleCost, profile: Profile) -> ModuleRow:
    ratio = profile.law.state_bytes / profile.trainable_bytes if profile.trainable_bytes else 0.0
    return ModuleRow(
        path=module.path,
        cls=module.cls,
        weights=module.weight_bytes,
        gradients=module.weight_bytes,
        optimizer_state=int(module.weight_bytes * ratio),
        activations=module.activation_bytes,
        forward_s=module.forward_s,
        backward_s=module.backward_s,
    )


def _plan_rows(plan: Plan) -> list[PlanRow]:
    rows: list[PlanRow] = []
    for run in grouped(plan.choices):
        freed: dict[str, int] = {}
        for choice in run:
            for column, num_bytes in choice.freed.items():
                freed[column] = freed.get(column, 0) + num_bytes
        added = sum(c.added_s for c in run)
        rows.append(PlanRow(run[0].method, where(run), run[0].note, freed, added))
    return rows


def _code_rows(profile: Profile) -> list[CodeRow]:
    rows: list[CodeRow] = []
    for setting, error in largest_errors(profile.coding):
        name = setting_text(setting)
        cells = [
            _code_cell(name, path, by.get(setting), profile.gradient_noise.get(path))
            for path, by in profile.coding.items()
        ]
        rows.append(CodeRow(name, error, cells))
    return rows


def _code_cell(
    name: str, path: str, cost: CodingCost | None, noise: float | None
) -> CodeCell | None:
    if cost is None:
        return None
    lines = [
        f"{name} on {path}",
        f"own gradient: error {cost.own_error:.2%}, cosine {cost.own_cosine:.4f}",
        f"whole gradient: error {cost.squared_error**0.5:.2%}",
    ]
    if noise:
        lines.append(f"of the variance of batches: {(cost.own_error / noise) ** 2:.1%}")
    return CodeCell(cost.own_error, "\n".join(lines))


def _facts(profile: Profile | None, plan: Plan | None) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if plan is not None:
        facts += [
            ("plain peak, predicted", format_bytes(plan.plain_peak_bytes)),
            ("predicted peak", format_bytes(plan.peak_bytes)),
            (
                "predicted step",
                f"{format_seconds(plan.seconds)} (plain {format_seconds(plan.plain_seconds)})",
            ),
            ("exactness", f"{plan.loosest.value} (allowed: {plan.exactness.value})"),
        ]
    if profile is not None:
        facts += [
            ("weights", format_bytes(profile.weight_bytes)),
            ("trained", format_bytes(profile.trainable_bytes)),
            ("optimizer state", format_bytes(profile.law.state_bytes)),
            ("machine", f"{profile.rates.flops_per_s / 1e9:.0f} GFLOP/s, {profile.device}"),
        ]
        facts += sorted(profile.versions.items())
    return facts
