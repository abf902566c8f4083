"""``verify``: one planned step against one plain step, by value, on the user's own model and batch."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from slimgrad.applying.step import Step
from slimgrad.host import Host
from slimgrad.measuring.machine import free_bytes
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.stopwatch import seconds_of
from slimgrad.measuring.trace import checked_loss
from slimgrad.optimizers import plain_step
from slimgrad.types import Exactness
from slimgrad.verifying.blocks import compare_blocks
from slimgrad.verifying.gradient import (
    Outcome,
    captured_gradients,
    in_float64,
    relative_error,
    same_bits,
    widened,
    without_dropout,
)
from slimgrad.verifying.report import Report
from slimgrad.verifying.snapshot import Snapshot
from slimgrad.verifying.trial import restore, tried

_BEYOND = 1.5  # times the allowed error, that a control leaves out


def verify(
    step: Step, batch: Any, *, time_pairs: int = 1, available_bytes: int | None = None
) -> Report:
    """Run one planned and one plain step from the same state and compare them by value; nothing is changed.

    Loss, every gradient, the whole update, every buffer and the end of every random generator are compared.
    A plan of rung ``bitwise`` must give the same bits; one of rung ``exact`` gradients whose distance to
    float64 is at most twice plain's own, one of a looser rung that and the plan's ``error`` at most. A control, the
    same gradients with one of them zeroed, must fail.
    Where a plain step does not fit into ``available_bytes`` (default: what the machine has free), blocks are
    compared one at a time. ``time_pairs`` alternated pairs of steps are timed.
    """
    host = step.host
    counted, host.counts_steps = host.counts_steps, False
    try:
        peak = tried(step, batch).peak_bytes
        report = Report(
            peak_bytes=peak,
            predicted_peak_bytes=step.plan.peak_bytes,
            plain_peak_bytes=step.plan.plain_peak_bytes,
            budget_bytes=step.plan.budget_bytes,
            rung=step.plan.loosest,
            error=step.plan.error,
        )
        free = free_bytes(host.device) if available_bytes is None else available_bytes
        if 2 * step.plan.plain_peak_bytes <= free:
            _compare_steps(
                step, batch, report, time_pairs, float64=4 * step.plan.plain_peak_bytes <= free
            )
        else:
            report.mode = "blocks"
            compare_blocks(step, batch, report)
        return report
    finally:
        host.counts_steps = counted


def _plain_once(host: Host, batch: Any, *, update: bool = True) -> Outcome:
    model = host.model
    for parameter in model.parameters():
        parameter.grad = None
    undo = switch_off_cache(model)
    try:
        loss = checked_loss(host.loss_fn(model, batch))
        loss.backward()
    finally:
        undo()
    names = {id(p): n for n, p in model.named_parameters()}
    gradients = {
        names[id(p)]: p.grad.detach().clone() for p in model.parameters() if p.grad is not None
    }
    if update and host.optimizer is not None:
        if host.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(host.parameters(), host.clip_grad_norm)
        plain_step(host.optimizer)
    for parameter in model.parameters():
        parameter.grad = None
    return Outcome(float(loss.detach()), gradients)


def _slim_once(step: Step, batch: Any) -> Outcome:
    gradients: dict[str, Tensor] = {}
    with captured_gradients(step.host.model, gradients):
        loss = step(batch)
    return Outcome(float(loss), gradients)


def _finish(outcome: Outcome, step: Step, snapshot: Snapshot) -> Outcome:
    model = step.host.model
    moved = snapshot.moved()
    outcome.moves = {n: moved[id(p)] for n, p in model.named_parameters()}
    outcome.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    outcome.random = RandomState.now()
    return outcome


def _compare_steps(
    step: Step, batch: Any, report: Report, time_pairs: int, *, float64: bool
) -> None:
    is_looser = report.rung.rung > Exactness.EXACT.rung
    same = _with_same_draws(step, batch) if is_looser else None
    if report.rung is Exactness.BITWISE:
        plain, slim, _ = _both(step, batch, None)
        _judge_bits(report, plain, slim)
    elif same is not None:  # codes are for the step as it is trained
        _judge_rounding(report, *same, None)
        report.notes.append(
            "dropout and the like drew the same in both: compared with plain's gradient"
        )
    else:
        with without_dropout(step.host.model):
            plain, slim, wide = _both(step, batch, _float64_once if float64 else None)
        _judge_rounding(report, plain, slim, wide)
    report.time_ratio = _time_ratio(step, batch, time_pairs) if time_pairs else None


def _with_same_draws(step: Step, batch: Any) -> tuple[Outcome, Outcome] | None:
    """The plain and the planned step, where both draw the same random numbers; None where they draw others, or none."""
    before = RandomState.now()
    plain, slim, _ = _both(step, batch, None)
    assert plain.random is not None
    assert slim.random is not None
    draws = not plain.random.same_as(before)
    return (plain, slim) if draws and slim.random.same_as(plain.random) else None


def _both(
    step: Step, batch: Any, wide_run: Callable[[Host, Any], Outcome | None] | None
) -> tuple[Outcome, Outcome, Outcome | None]:
    host = step.host
    with step.suspended():
        snapshot = Snapshot(host.model, host.optimizer)
        plain = _finish(_plain_once(host, batch), step, snapshot)
        snapshot.restore()
        wide = wide_run(host, batch) if wide_run is not None else None
        snapshot.restore()
    slim = _slim_once(step, batch)
    slim.random = RandomState.now()
    with step.suspended():
        random, slim = slim.random, _finish(slim, step, snapshot)
        slim.random = random
        snapshot.restore()
    return plain, slim, wide


def _float64_once(host: Host, batch: Any) -> Outcome | None:
    try:
        with in_float64(host.model):
            return _plain_once(host, widened(batch), update=False)
    except Exception:  # a model with fixed dtypes inside
        return None


def _judge_bits(report: Report, plain: Outcome, slim: Outcome) -> None:
    _figures(report, plain, slim)
    report.checks |= {
        "loss": plain.loss == slim.loss,
        "gradient": same_bits(slim.gradients, plain.gradients),
        "update": same_bits(slim.moves, plain.moves),
        "buffers": bool(report.buffers_equal),
        "random state": bool(report.random_equal),
        "control": not same_bits(_zeroed(slim.gradients), plain.gradients),
    }
    report.control_failed = report.checks["control"]


def _judge_rounding(report: Report, plain: Outcome, slim: Outcome, wide: Outcome | None) -> None:
    _figures(report, plain, slim)
    is_looser = report.rung.rung > Exactness.EXACT.rung
    allowed = (report.error or 0.0) if is_looser else 0.0
    if wide is not None:
        report.plain_gradient_error = relative_error(plain.gradients, wide.gradients)
        report.float64_gradient_error = relative_error(slim.gradients, wide.gradients)
        bound, reference = allowed + 2 * report.plain_gradient_error + 1e-12, wide.gradients
    elif is_looser:
        bound, reference = allowed, plain.gradients
    else:
        precision = max((torch.finfo(g.dtype).eps for g in plain.gradients.values()), default=1e-7)
        bound, reference = 1e4 * precision, plain.gradients
        report.notes.append(
            "float64 could not be run: gradients are compared with plain's directly"
        )
    judged = relative_error(slim.gradients, reference)
    control = relative_error(_zeroed(slim.gradients, allowed), reference)
    report.control_failed = control > bound
    report.checks |= {
        "gradient": judged <= bound,
        "loss": bool(report.loss_error is not None and report.loss_error < 1e-3),
        "buffers": bool(report.buffers_equal) or _buffers_agree(plain, slim),
        "control": report.control_failed,
    }


def _buffers_agree(plain: Outcome, slim: Outcome) -> bool:
    """Whether counters are the same and statistics the same up to rounding."""
    wide = {n for n, b in plain.buffers.items() if b.is_floating_point()}
    of = lambda o, names: {n: b for n, b in o.buffers.items() if n in names}  # noqa: E731
    precision = max((torch.finfo(plain.buffers[n].dtype).eps for n in wide), default=0.0)
    same = same_bits(of(slim, set(slim.buffers) - wide), of(plain, set(plain.buffers) - wide))
    return same and relative_error(of(slim, wide), of(plain, wide)) <= 100 * precision


def _figures(report: Report, plain: Outcome, slim: Outcome) -> None:
    report.loss_error = abs(slim.loss - plain.loss) / max(abs(plain.loss), 1e-12)
    report.gradient_error = relative_error(slim.gradients, plain.gradients)
    report.non_finite = [n for n, g in plain.gradients.items() if not bool(g.isfinite().all())]
    report.update_error = relative_error(slim.moves, plain.moves)
    report.buffers_equal = same_bits(slim.buffers, plain.buffers)
    assert plain.random is not None
    assert slim.random is not None
    report.random_equal = slim.random.same_as(plain.random)


def _zeroed(gradients: dict[str, Tensor], allowed: float = 0.0) -> dict[str, Tensor]:
    """What dropped gradients would look like: the largest zeroed, and others until they are more than an error allows.

    Where that may be more than all of the gradient, its direction is reversed.
    """
    norms = {n: float(g.double().square().sum()) for n, g in gradients.items()}
    dropped, gone, wanted = set[str](), 0.0, (_BEYOND * allowed) ** 2 * sum(norms.values())
    for name in sorted(norms, key=norms.__getitem__, reverse=True):
        if dropped and gone > wanted:
            break
        dropped.add(name)
        gone += norms[name]
    if gone < wanted:
        return {n: -(1 + allowed) * g for n, g in gradients.items()}
    return {n: torch.zeros_like(g) if n in dropped else g for n, g in gradients.items()}


def _time_ratio(step: Step, batch: Any, pairs: int) -> float:
    host, plain_s, slim_s = step.host, list[float](), list[float]()
    with step.suspended():
        snapshot = Snapshot(host.model, host.optimizer)
    for _ in range(pairs):
        slim_s.append(seconds_of(lambda: step(batch), host.device))
        with step.suspended():
            plain_s.append(seconds_of(lambda: _plain_once(host, batch), host.device))
    restore(step, snapshot)
    return median(slim_s) / median(plain_s)
