"""The options that say what to train: shared by every command that takes a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_JOB = (
    click.argument("model", default="smollm2"),
    click.option(
        "--data", help="A text or JSONL file; default: the Python documentation's topics."
    ),
    click.option("--seq-len", default=512, show_default=True, help="Tokens a sample."),
    click.option("--batch-size", default=2, show_default=True, help="Samples a batch."),
    click.option("--lr", default=2e-5, show_default=True, help="AdamW's learning rate."),
    click.option("--weight-decay", default=0.01, show_default=True, help="AdamW's weight decay."),
    click.option("--seed", default=0, show_default=True, help="Of the order of the data."),
)

_PLAN = (
    click.option(
        "--budget", default="min", show_default=True, help="1GiB, 800MiB, 40%, bytes, or min."
    ),
    click.option(
        "--exactness",
        type=click.Choice(["bitwise", "exact", "unbiased", "approximate", "different"]),
        default="exact",
        show_default=True,
        help="The loosest rung allowed.",
    ),
    click.option(
        "--error",
        type=click.FloatRange(min=0, min_open=True),
        help="Of the gradient, relative, that the rungs unbiased and approximate may bring; default: 0.05.",
    ),
    click.option(
        "--allow", multiple=True, help="A method of rung 'different' to allow; repeatable."
    ),
    click.option("--forbid", multiple=True, help="A method to leave out; repeatable."),
    click.option("--clip-grad-norm", type=float, help="Clip the gradient's global norm."),
    click.option(
        "--compile/--no-compile",
        "allow_compile",
        default=None,
        help="Let blocks be compiled by torch.compile; default: where that pays off.",
    ),
)


def job_options(function: F) -> F:
    """MODEL and what it is trained on."""
    for option in reversed(_JOB):
        function = option(function)
    return function


def plan_options(function: F) -> F:
    """The budget and what is allowed to reach it."""
    for option in reversed(_PLAN):
        function = option(function)
    return function


JOB_NAMES = ("model", "data", "seq_len", "batch_size", "lr", "weight_decay", "seed")


def job_spec(options: dict[str, Any]) -> Any:
    """The ``JobSpec`` among a command's options."""
    from slimgrad.training.job import JobSpec

    return JobSpec(**{name: options[name] for name in JOB_NAMES})


def plan_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What ``slimgrad.plan`` takes, among a command's options, the budget apart."""
    return {
        "exactness": options["exactness"],
        "error": options["error"],
        "allow": options["allow"],
        "forbid": options["forbid"],
        "clip_grad_norm": options["clip_grad_norm"],
        "allow_compile": options["allow_compile"],
        "steps": options.get("steps"),
    }


def measure_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What ``slimgrad.measure`` takes, among a command's options."""
    from slimgrad.planning.plan import needs_sensitivity

    is_bitwise = options["exactness"] == "bitwise"  # which compiled code never is
    return {
        "sensitivity": needs_sensitivity(options["exactness"], options["error"]),
        "progress": lambda text: click.echo(text, err=True),
        "allow_compile": False if is_bitwise else options["allow_compile"],
        "steps": options.get("steps"),
    }


run_length = click.option(
    "--steps", type=click.IntRange(min=1), help="Steps of the run, over which compiling pays off."
)
