"""Train with a plan saved by 'slimgrad plan --save'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from slimgrad.cli.job_options import job_options, job_spec
from slimgrad.cli.training_output import run_and_print


@click.command()
@click.argument("plan_file", type=click.Path(path_type=Path))
@job_options
@click.option("--steps", default=16, show_default=True, help="Training steps.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/run"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def command(plan_file: Path, steps: int, out: Path, as_json: bool, **options: Any) -> None:
    """Train MODEL with the plan in PLAN_FILE: no measuring, no planning, the same choices again."""
    from slimgrad.planning.plan import Plan
    from slimgrad.training.loop import TrainRequest

    ready = Plan.load(plan_file)
    request = TrainRequest(
        spec=job_spec(options), budget=ready.budget, num_steps=steps, out=out, proof=False
    )
    request = replace(request, ready_plan=ready, clip_grad_norm=ready.clip_grad_norm)
    run_and_print(request, as_json=as_json)
