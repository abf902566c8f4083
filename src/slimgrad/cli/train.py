"""Fine-tune a pretrained model on text within a memory budget, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimgrad.cli.job_options import job_options, job_spec, plan_options
from slimgrad.cli.training_output import run_and_print


@click.command()
@job_options
@plan_options
@click.option("--steps", default=16, show_default=True, help="Training steps.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/train"), show_default=True
)
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in --out.")
@click.option("--save-every", default=0, help="Also write a checkpoint every N steps.")
@click.option("--proof/--no-proof", default=True, help="Run plain training beside and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def command(
    steps: int, out: Path, resume: bool, save_every: int, proof: bool, as_json: bool, **options: Any
) -> None:
    """Fine-tune every parameter of MODEL on text within a memory budget, and prove the budget and the update."""
    from slimgrad.training.loop import TrainRequest
    from slimgrad.types import Exactness

    request = TrainRequest(
        spec=job_spec(options),
        budget=options["budget"],
        exactness=Exactness(options["exactness"]),
        error=options["error"],
        allow=options["allow"],
        forbid=options["forbid"],
        clip_grad_norm=options["clip_grad_norm"],
        allow_compile=options["allow_compile"],
        num_steps=steps,
        out=out,
        resume=resume,
        save_every=save_every,
        proof=proof,
    )
    run_and_print(request, as_json=as_json)
