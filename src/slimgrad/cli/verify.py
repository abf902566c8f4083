"""Verify a planned training step by value against plain training; nothing is trained."""

from __future__ import annotations

import json
from typing import Any

import click

from slimgrad.cli.job_options import (
    job_options,
    job_spec,
    plan_arguments,
    plan_options,
    run_length,
)


@click.command()
@job_options
@plan_options
@run_length
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(as_json: bool, **options: Any) -> None:
    """Measure, plan and apply, then compare one planned step of MODEL with one plain step by value."""
    from slimgrad.training.job import loss_fn, open_job
    from slimgrad.verifying.slimming import slim

    job = open_job(job_spec(options))
    step = slim(
        job.model,
        job.optimizer,
        loss_fn,
        next(job.batches),
        budget=options["budget"],
        **plan_arguments(options),
    )
    report = step.report
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, default=str))
        return
    click.echo(f"{step.plan}\n\n{report}")
