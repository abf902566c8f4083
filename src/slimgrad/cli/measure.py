"""Show where the memory and the time of one training step go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimgrad.cli.job_options import job_options, job_spec

if TYPE_CHECKING:
    from slimgrad.measuring.profile import Profile


@click.command()
@job_options
@click.option("--fake", is_flag=True, help="Allocate nothing: shapes only, no weights are read.")
@click.option(
    "--compile/--no-compile",
    "allow_compile",
    default=False,
    show_default=True,
    help="Compile blocks too (10-40 s each kind), so that plans from this profile may use them.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also what each code of saved tensors does to the gradient, block by block.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Write an HTML report here.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write the profile here, for 'slimgrad plan'."
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
def command(
    fake: bool,
    allow_compile: bool,
    sensitivity: bool,
    html: Path | None,
    save: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show where the memory and the time of one training step of MODEL go. Nothing is trained."""
    from slimgrad.measuring.profile import profile_to_json
    from slimgrad.planning.profiling import measure
    from slimgrad.training.job import loss_fn, open_fake_job, open_job
    from slimgrad.training.memory_report import save_report

    if fake and sensitivity:
        raise click.UsageError("--sensitivity runs real passes: leave --fake out")
    spec = job_spec(options)
    if fake:
        model, optimizer, batch = open_fake_job(spec)
        profile = measure(model, optimizer, loss_fn, batch, limit_bytes=1 << 28)
    else:
        job = open_job(spec)
        profile = measure(
            job.model,
            job.optimizer,
            loss_fn,
            next(job.batches),
            allow_compile=allow_compile,
            sensitivity=sensitivity,
            progress=lambda text: click.echo(text, err=True),
        )
    if save is not None:
        profile.save(save)
    if html is not None:
        save_report(html, f"slimgrad measure {spec.model}", profile)
    if as_json:
        data = profile_to_json(profile)
        for name in ("variants", "timeline", "law"):
            data.pop(name)
        click.echo(json.dumps(data, indent=2, default=str))
        return
    click.echo(str(profile))
    if sensitivity:
        click.echo(f"\n{_sensitivity_text(profile)}")


def _sensitivity_text(profile: Profile) -> str:
    """A row for each setting of the codes: what the gradient is with it, and its time."""
    from statistics import median

    from rich.table import Table

    from slimgrad.measuring.table import as_text
    from slimgrad.planning.sensitivity import largest_errors, setting_text

    if not profile.coding:
        return "codes of saved tensors: no block saves a tensor that one of them is for"
    title = "Saved tensors as codes, on every block that they suit"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("setting")
    noise = profile.gradient_noise.get("")
    heads = ["error", "own", "cosine", "encode, ns", "decode, ns"]
    for name in heads if noise is None else [*heads, "of batch variance"]:
        table.add_column(name, justify="right")
    for setting, error in largest_errors(profile.coding):
        costs = [by[setting] for by in profile.coding.values() if setting in by]
        spent = (median(c.encode_s for c in costs), median(c.decode_s for c in costs))
        own, cosine = max(c.own_error for c in costs), min(c.own_cosine for c in costs)
        figures = [f"{error:.2g}", f"{own:.2g}", f"{cosine:.4f}"]
        figures += [f"{1e9 * seconds:.2f}" for seconds in spent]
        if noise is not None:
            figures.append(f"{(error / noise) ** 2:.2g}" if noise else "")
        table.add_row(setting_text(setting), *figures)
    return as_text(table, "", _SENSITIVITY_NOTE + (_NOISE_NOTE if noise is not None else ""))


_SENSITIVITY_NOTE = (
    "error: relative L2, of the whole gradient; own: of the gradient of one block's own parameters, where it is "
    "largest; cosine: of that gradient with the exact one, where it is least; encode and decode: of one element. "
    "Block by block: --json, --html."
)
_NOISE_NOTE = (
    " of batch variance: the error's square over that of what another batch of this size would change (standard "
    "deviation; from the gradients of the batch's halves)."
)
