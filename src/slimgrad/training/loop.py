"""The loop behind ``slimgrad train``: a job under a budget, measured, planned, run, checkpointed and proved."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from slimgrad.applying.step import Step, apply
from slimgrad.errors import CheckpointError
from slimgrad.measuring.ledger import MemoryTimeline
from slimgrad.measuring.profile import Profile, fingerprint
from slimgrad.planning.plan import Plan, needs_sensitivity, plan
from slimgrad.planning.profiling import measure
from slimgrad.training.checkpoint import latest, load_checkpoint, save_checkpoint
from slimgrad.training.job import Job, JobSpec, loss_fn, open_job
from slimgrad.training.models import import_libraries
from slimgrad.training.offloaded import state_sink, state_source
from slimgrad.training.reference import Reference, run_reference
from slimgrad.training.resident import (
    high_water_bytes,
    release_memory,
    reset_high_water,
    resident_bytes,
    return_freed_memory,
)
from slimgrad.training.resume import capture, restore
from slimgrad.types import Budget, Exactness

_COMPARED_STEPS = 2
_HEADROOM = (
    1.25  # resident bytes allowed over the budget: libraries' workspaces, fragmentation, Python
)
_LEAST_HEADROOM_BYTES = 64 << 20  # what any process takes for itself while it trains
_COMPILER = "torch._inductor.compile_fx"
_COMPILER_BYTES = (
    128 << 20
)  # its code and what it keeps of a block: 100 MiB (SmolLM2's, torch 2.13)


@dataclass(frozen=True)
class TrainRequest:
    """What the user asks for. ``proof`` runs plain training beside, in a process of its own, and compares."""

    spec: JobSpec
    budget: str = "min"
    exactness: Exactness = Exactness.EXACT
    error: float | None = None  # of the gradient, on rungs that allow one
    allow: Sequence[str] = ()
    forbid: Sequence[str] = ()
    clip_grad_norm: float | None = None
    num_steps: int = 16
    out: Path | None = None
    resume: bool = False
    save_every: int = 0
    proof: bool = True
    ready_plan: Plan | None = None
    allow_compile: bool | None = None


@dataclass(frozen=True)
class StepLine:
    """One finished step: loss, tokens a second, live bytes after it and the most during it."""

    index: int
    num_steps: int
    loss: float
    tokens_per_s: float
    now_bytes: int
    peak_bytes: int
    seconds: float


@dataclass
class TrainResult:
    """A finished run."""

    plan: Plan
    lines: list[StepLine]
    peak_bytes: int
    timeline: MemoryTimeline | None
    load_resident_bytes: int | None
    checkpoint: Path | None
    reference: Reference | None = None
    update_error: float | None = None
    rows: list[tuple[str, str, bool | None]] = field(default_factory=list)

    @property
    def resident_limit_bytes(self) -> int:
        """What the process may have resident beyond its size before the model was loaded.

        Where something was compiled, torch's compiler has been loaded since.
        """
        compiler = _COMPILER_BYTES if _COMPILER in sys.modules else 0
        budget = self.plan.budget_bytes
        return max(int(budget * _HEADROOM), budget + _LEAST_HEADROOM_BYTES) + compiler


class Listener(Protocol):
    """Who is told how the run goes."""

    def phase(self, text: str) -> None:
        """A part of the run begins."""

    def reference(self, reference: Reference) -> None:
        """Plain training was run."""

    def measured(self, profile: Profile) -> None:
        """The step was measured."""

    def planned(self, plan: Plan) -> None:
        """The plan was made."""

    def stepped(self, line: StepLine) -> None:
        """A step is done."""


def train(request: TrainRequest, listener: Listener) -> tuple[TrainResult, Profile | None]:
    """Run a job under its budget. Raises ``BudgetError`` where nothing fits, before any training."""
    Budget.parse(request.budget)
    folder = Path(tempfile.mkdtemp(prefix="slimgrad-plain-"))
    try:
        reference = None
        if request.proof and not request.resume:
            listener.phase("plain training, in a process of its own (the reference)")
            reference = run_reference(request.spec, folder, _COMPARED_STEPS)
            listener.reference(reference)
        return _train_within(request, reference, listener)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train_within(
    request: TrainRequest, reference: Reference | None, listener: Listener
) -> tuple[TrainResult, Profile | None]:
    import_libraries()
    return_freed_memory()
    before = resident_bytes() if reset_high_water() else None
    listener.phase(f"loading {request.spec.model}")
    job = open_job(request.spec)
    return_freed_memory()
    made, profile = _planned(request, job, listener)
    step = apply(
        made,
        job.model,
        job.optimizer,
        loss_fn,
        clip_grad_norm=request.clip_grad_norm,
        profile=profile,
    )
    done = _resume(request, job, step) if request.resume else 0
    result = TrainResult(made, [], 0, None, None, None, reference)
    listener.phase(f"training {request.num_steps} steps within {made.budget}")
    _run_steps(request, job, step, done, result, listener)
    result.plan = step.plan  # tightened, where a first step passed the budget
    if request.out is not None:
        result.checkpoint = _save(request, job, step, request.num_steps)
    high = high_water_bytes()
    if before is not None and high is not None:
        result.load_resident_bytes = high - before
    result.rows = proof_rows(result)
    step.undo()
    return result, profile


def _planned(request: TrainRequest, job: Job, listener: Listener) -> tuple[Plan, Profile | None]:
    if request.ready_plan is not None:
        listener.planned(request.ready_plan)
        return request.ready_plan, None
    listener.phase("measuring where the memory goes (fake tensors; single operations timed)")
    position = job.batches.state()
    batch = next(job.batches)
    job.batches.restore(position)
    limit = Budget.parse(request.budget).bytes
    weights = sum(p.numel() * p.element_size() for p in job.model.parameters())
    compiles = False if request.exactness is Exactness.BITWISE else request.allow_compile
    profile = measure(
        job.model,
        job.optimizer,
        loss_fn,
        batch,
        limit_bytes=max(limit - weights, 1 << 26) if limit else None,
        allow_compile=compiles,
        steps=request.num_steps,
        sensitivity=needs_sensitivity(request.exactness, request.error),
    )
    listener.measured(profile)
    made = plan(
        profile,
        request.budget,
        exactness=request.exactness,
        error=request.error,
        allow=request.allow,
        forbid=request.forbid,
        clip_grad_norm=request.clip_grad_norm,
        allow_compile=compiles,
        steps=request.num_steps,
    )
    listener.planned(made)
    release_memory()  # of the programme that was solved
    return made, profile


def _run_steps(
    request: TrainRequest, job: Job, step: Step, done: int, result: TrainResult, listener: Listener
) -> None:
    tokens = request.spec.seq_len * request.spec.batch_size
    for index in range(done, request.num_steps):
        batch: Any = next(job.batches)
        begin = time.perf_counter()
        with step.ledger(batch) as ledger:
            loss = step(batch)
        taken = time.perf_counter() - begin
        if ledger.peak_bytes > result.peak_bytes:
            result.peak_bytes, result.timeline = ledger.peak_bytes, ledger.timeline
        line = StepLine(
            index + 1,
            request.num_steps,
            float(loss),
            tokens / taken,
            ledger.now_bytes,
            ledger.peak_bytes,
            taken,
        )
        result.lines.append(line)
        listener.stepped(line)
        if result.reference is not None and index + 1 == _COMPARED_STEPS:
            result.update_error = result.reference.update_error(job.model)
        if request.out is not None and request.save_every and (index + 1) % request.save_every == 0:
            _save(request, job, step, index + 1)


def _save(request: TrainRequest, job: Job, step: Step, num_steps: int) -> Path:
    assert request.out is not None
    state = capture(
        job.model,
        job.optimizer,
        step=num_steps,
        data=job.batches.state(),
        extra={"spec": request.spec.to_json()},
        fingerprint=fingerprint(job.model, job.optimizer),
        state_of=state_source(step.host),
    )
    return save_checkpoint(request.out, state)


def _resume(request: TrainRequest, job: Job, step: Step) -> int:
    if request.out is None or latest(request.out) is None:
        raise CheckpointError(
            f"there is no whole checkpoint in {request.out}: expected a folder written by "
            "'slimgrad train --out', to resume with the same folder"
        )
    checkpoint = load_checkpoint(request.out)
    restore(
        checkpoint,
        job.model,
        job.optimizer,
        fingerprint=fingerprint(job.model, job.optimizer),
        put_state=state_sink(step.host),
    )
    job.batches.restore(checkpoint.values["data"])
    return checkpoint.step


def proof_rows(result: TrainResult) -> list[tuple[str, str, bool | None]]:
    """What was promised, what was found, and whether it held (None: told, not judged)."""
    from slimgrad.types import format_bytes as shown

    made, reference = result.plan, result.reference
    rows: list[tuple[str, str, bool | None]] = []
    plain = reference.peak_bytes if reference is not None else made.plain_peak_bytes
    how = "measured" if reference is not None else "predicted"
    rows.append((f"plain training's peak ({how})", shown(plain), None))
    rows.append(
        ("budget", f"{shown(made.budget_bytes)} ({made.budget_bytes / plain:.0%} of plain)", None)
    )
    rows.append(("predicted peak", shown(made.peak_bytes), None))
    off = (
        f"{shown(result.peak_bytes)} ({result.peak_bytes / made.peak_bytes - 1:+.2%} of predicted)"
    )
    rows.append(("measured peak, most of all steps", off, result.peak_bytes <= made.budget_bytes))
    if reference is not None and result.update_error is not None:
        bound = max(3 * reference.own_error, 1e-12)
        text = f"{result.update_error:.1e} (plain's own, against {reference.own_error_in}: {reference.own_error:.1e})"
        rows.append(
            (
                f"error of the update after {_COMPARED_STEPS} steps",
                text,
                result.update_error <= bound,
            )
        )
        losses = [line.loss for line in result.lines[:_COMPARED_STEPS]]
        gap = max(abs(a - b) for a, b in zip(losses, reference.losses, strict=True))
        rows.append(("largest difference of the losses", f"{gap:.1e}", None))
        ratio = min(line.seconds for line in result.lines) / reference.step_s
        rows.append(("step time against plain", f"{ratio:.2f}", None))
    if result.load_resident_bytes is not None:
        text = f"{shown(result.load_resident_bytes)} (at most {shown(result.resident_limit_bytes)})"
        rows.append(
            (
                "resident memory above the empty process",
                text,
                result.load_resident_bytes <= result.resident_limit_bytes,
            )
        )
    if len(result.lines) > 1:
        first, last = result.lines[0].loss, result.lines[-1].loss
        rows.append(("loss, first and last step", f"{first:.4f} -> {last:.4f}", None))
    return rows
