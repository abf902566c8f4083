"""How a training run is shown: tables and progress for people, one JSON object a line for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from slimgrad.measuring.profile import Profile
    from slimgrad.planning.plan import Plan
    from slimgrad.training.loop import StepLine, TrainRequest, TrainResult
    from slimgrad.training.reference import Reference


class ForPeople:
    """Prints each stage as it happens."""

    def phase(self, text: str) -> None:
        """A part of the run begins."""
        click.echo(f"\n== {text}")

    def reference(self, reference: Reference) -> None:
        """Plain training's own figures."""
        from slimgrad.types import format_bytes, format_seconds

        click.echo("where the memory goes in plain training (most bytes of each column):")
        for column, num_bytes in reference.columns.items():
            click.echo(f"  {column.replace('_', ' '):<16}{format_bytes(num_bytes):>12}")
        peak = format_bytes(reference.peak_bytes)
        click.echo(f"  {'peak':<16}{peak:>12}   one step {format_seconds(reference.step_s)}")

    def measured(self, profile: Profile) -> None:
        """The profile's tables."""
        click.echo(str(profile))

    def planned(self, plan: Plan) -> None:
        """The plan's table."""
        click.echo(f"\n{plan}")

    def stepped(self, line: StepLine) -> None:
        """One line a step."""
        from slimgrad.types import format_bytes

        click.echo(
            f"step {line.index:>4}/{line.num_steps}  loss {line.loss:.4f}  {line.tokens_per_s:7.1f} tokens/s  "
            f"now {format_bytes(line.now_bytes):>10}  peak {format_bytes(line.peak_bytes):>10}"
        )

    def finished(self, result: TrainResult, report: Any) -> None:
        """The proof, and what was written."""
        click.echo("\n== proof")
        marks = {True: "ok", False: "FAILED", None: ""}
        for name, figure, held in result.rows:
            click.echo(f"{name:<42} {figure}  {marks[held]}".rstrip())
        if result.checkpoint is not None:
            click.echo(
                f"checkpoint: {result.checkpoint} (go on with 'slimgrad train --resume' and the same options)"
            )
        if report is not None:
            click.echo(f"memory report: {report}")


class ForPrograms:
    """Prints one JSON object a line."""

    def _say(self, kind: str, **values: Any) -> None:
        click.echo(json.dumps({"event": kind, **values}, default=str))

    def phase(self, text: str) -> None:
        """A part of the run begins."""
        self._say("phase", text=text)

    def reference(self, reference: Reference) -> None:
        """Plain training's own figures."""
        self._say(
            "plain",
            peak_bytes=reference.peak_bytes,
            columns=reference.columns,
            losses=reference.losses,
            step_s=reference.step_s,
            own_error=reference.own_error,
        )

    def measured(self, profile: Profile) -> None:
        """The profile's figures."""
        columns = {c.value: v for c, v in profile.columns.items()}
        self._say(
            "profile", peak_bytes=profile.peak_bytes, columns=columns, seconds=profile.seconds
        )

    def planned(self, plan: Plan) -> None:
        """The plan."""
        self._say("plan", **plan.to_json())

    def stepped(self, line: StepLine) -> None:
        """One step."""
        self._say("step", **vars(line))

    def finished(self, result: TrainResult, report: Any) -> None:
        """The proof."""
        self._say(
            "result",
            peak_bytes=result.peak_bytes,
            budget_bytes=result.plan.budget_bytes,
            update_error=result.update_error,
            resident_bytes=result.load_resident_bytes,
            checkpoint=result.checkpoint,
            report=report,
            proof=result.rows,
            passed=all(held is not False for _, _, held in result.rows),
        )


def run_and_print(request: TrainRequest, *, as_json: bool) -> None:
    """Train, show it, write the HTML report; exit code 3 if a promise was not kept."""
    from slimgrad.training.loop import train
    from slimgrad.training.memory_report import save_report

    listener = ForPrograms() if as_json else ForPeople()
    result, profile = train(request, listener)
    report = None
    if request.out is not None:
        plain = result.reference.timeline if result.reference is not None else None
        title = f"slimgrad: {request.spec.model} within {result.plan.budget}"
        report = save_report(
            request.out / "memory.html",
            title,
            profile,
            result.plan,
            plain=plain,
            planned=result.timeline,
            proof=result.rows,
        )
    listener.finished(result, report)
    if any(held is False for _, _, held in result.rows):
        raise SystemExit(3)
