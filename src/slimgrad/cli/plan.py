"""Plan a training step within a memory budget, and show what is done where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from slimgrad.cli.job_options import (
    job_options,
    job_spec,
    measure_arguments,
    plan_arguments,
    plan_options,
    run_length,
)

if TYPE_CHECKING:
    from slimgrad.measuring.profile import Profile
    from slimgrad.training.job import JobSpec


@click.command()
@job_options
@plan_options
@run_length
@click.option(
    "--profile", type=click.Path(path_type=Path), help="Plan from a profile saved by 'measure'."
)
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write the plan here, for 'slimgrad run'."
)
@click.option("--html", type=click.Path(path_type=Path), help="Write an HTML report here.")
@click.option(
    "--explain",
    "why",
    is_flag=True,
    help="Say what binds, what memory is worth, and what more of it buys.",
)
@click.option(
    "--layout",
    is_flag=True,
    help="Run a step under the plan and lay its tensors out in one arena: fragmentation, by rule.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    profile: Path | None,
    save: Path | None,
    html: Path | None,
    why: bool,
    layout: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan a training step of MODEL within a budget. Nothing is trained; exit code 2 if nothing fits."""
    from slimgrad.applying.step import apply
    from slimgrad.measuring.profile import Profile
    from slimgrad.planning.explain import explain
    from slimgrad.planning.plan import plan
    from slimgrad.planning.profiling import measure
    from slimgrad.training.job import loss_fn, open_job
    from slimgrad.training.memory_report import save_report
    from slimgrad.verifying.layout import lay_out

    if layout and profile is not None:
        raise click.UsageError(
            "--layout runs a step, which --profile has no model for: leave one out"
        )
    spec = job_spec(options)
    job = None
    if profile is not None:
        measured = Profile.load(profile)
        _tell_other_shape(measured, spec)
    else:
        job = open_job(spec)
        measured = measure(
            job.model, job.optimizer, loss_fn, next(job.batches), **measure_arguments(options)
        )
    made = plan(measured, options["budget"], **plan_arguments(options))
    if save is not None:
        made.save(save)
    if html is not None:
        save_report(html, f"slimgrad plan {spec.model}", measured, made)
    reason = explain(measured, options["budget"], **plan_arguments(options)) if why else None
    laid_out = None
    if layout and job is not None:
        with apply(made, job.model, job.optimizer, loss_fn) as step:
            laid_out = lay_out(step, next(job.batches))
    if as_json:
        data = made.to_json() | ({"explanation": reason.to_json()} if reason else {})
        data |= {"layout": laid_out.to_json()} if laid_out else {}
        click.echo(json.dumps(data, indent=2, default=str))
    else:
        click.echo("\n\n".join(str(part) for part in (made, reason, laid_out) if part is not None))


def _tell_other_shape(measured: Profile, spec: JobSpec) -> None:
    """A profile is of one batch: say so where the command line gives another shape."""
    from slimgrad.batches import format_shapes

    given, asked = click.get_current_context().get_parameter_source, (spec.batch_size, spec.seq_len)
    named = [n for n in ("batch_size", "seq_len") if given(n) is ParameterSource.COMMANDLINE]
    shapes = {tuple(shape) for _, shape in measured.batch_shapes.values()}
    if not named or not shapes or asked in shapes:
        return
    found = format_shapes(measured.batch_shapes)
    flags = " and ".join(f"--{n.replace('_', '-')}" for n in named)
    click.echo(
        f"note: the plan is for the batch that was measured ({found}); {flags} changes nothing: measure again",
        err=True,
    )
