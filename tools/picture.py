"""Draw docs/images/memory.svg from a real run: ``python tools/picture.py [--model smollm2] [--budget 1GiB]``.

Live tensor bytes over the second step of plain training, and over the second step under the plan, both counted
by the ledger in this process (the first step makes the optimizer's state). Needs memory for the plain step.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import slimgrad
from slimgrad.measuring.ledger import MemoryTimeline
from slimgrad.measuring.report import timeline_svg
from slimgrad.training.job import Job, JobSpec, loss_fn, open_job
from slimgrad.training.memory_report import drawn
from slimgrad.types import format_bytes

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "memory.svg"


def second_step(run: Callable[[], object], ledger: Callable[[], slimgrad.Ledger]) -> MemoryTimeline:
    """The timeline of the second of two runs."""
    run()
    with ledger() as counted:
        run()
    return counted.timeline


def plain_timeline(job: Job, batch: Any) -> MemoryTimeline:
    """Plain training; gradients are set free after the update, as ``zero_grad`` does."""

    def run() -> None:
        loss_fn(job.model, batch).backward()
        job.optimizer.step()
        job.optimizer.zero_grad()

    return second_step(run, lambda: slimgrad.Ledger(job.model, job.optimizer, inputs=batch))


def _without_hover(svg: str) -> str:
    """The picture without the figures that the HTML report's pointer reads: an image in a page has no pointer."""
    return re.sub(r' data-[a-z-]+="[^"]*"', "", svg) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, plan, run both, draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    job = open_job(JobSpec(options.model, seq_len=options.seq_len, batch_size=options.batch_size))
    batch = next(job.batches)
    plan = slimgrad.plan(slimgrad.measure(job.model, job.optimizer, loss_fn, batch), options.budget)
    print(plan)
    plain = plain_timeline(job, batch)
    with slimgrad.apply(plan, job.model, job.optimizer, loss_fn) as step:
        planned = second_step(lambda: step(batch), lambda: step.ledger(batch))
    print(f"plain {format_bytes(plain.peak_bytes)}, planned {format_bytes(planned.peak_bytes)}")
    svg = timeline_svg(
        [drawn("plain", plain), drawn(f"within {options.budget}", planned)], plan.budget_bytes
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(_without_hover(svg), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
