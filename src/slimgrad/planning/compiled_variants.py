"""The step compiled as a whole: whether that is worth a measurement, and the traces of methods that do it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimgrad import catalogue
from slimgrad.host import Host
from slimgrad.measuring.clock import OpKey, coarsest
from slimgrad.measuring.compiled_code import first_line, unmark_later
from slimgrad.measuring.compiled_step import compiled_step
from slimgrad.measuring.machine import free_bytes
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.measuring.trace import Trace
from slimgrad.method import Block, Method, Refusal, Rewriting, Scope, method_name
from slimgrad.planning.compiling import COMPILE_S, USUAL_GAIN, why_nothing
from slimgrad.types import format_bytes

_COMPILE_OP_S = 0.03  # what an operation of the plain step adds to compiling all


@dataclass(frozen=True)
class Asked:
    """Whether compiling is allowed (None: where it may pay off within ``steps``), and what it may take."""

    allow: bool | None
    steps: int
    limit_s: float
    limit_bytes: int | None


@dataclass(frozen=True)
class Variants:
    """The traces of the step with methods that compile it, what compiling took, and why others are left out."""

    traces: dict[Method, Trace]
    compile_s: float
    refusals: dict[str, str]
    spent_s: float


def compiled_variants(
    host: Host, batch: Any, plain: Trace, keys: Sequence[OpKey], asked: Asked
) -> Variants:
    """The step with each rewriting method that compiles, traced and timed on real steps."""
    begin = time.perf_counter()
    traces, compile_s, refusals = dict[Method, Trace](), 0.0, dict[str, str]()
    for name, cls in catalogue.methods().items():
        if not isinstance(cls, Rewriting) or not getattr(cls, "compiles", False):
            continue
        reason = _why_not(host, plain, asked)
        settings = Refusal(reason) if reason else cls.settings(host, batch)
        if isinstance(settings, Refusal):
            refusals[name] = settings.reason
            continue
        for method in settings:
            try:
                traces[method], took_s = _measured(host, batch, plain, method, coarsest(keys))
                compile_s = max(compile_s, took_s)
            except Exception as error:  # torch.compile fails in as many ways as there are models
                refusals[method_name(method)] = first_line(error)
    return Variants(traces, compile_s, refusals, time.perf_counter() - begin)


def _why_not(host: Host, plain: Trace, asked: Asked) -> str | None:
    reason = why_nothing(host, asked.allow)
    if reason is not None:
        return reason
    expected_s = COMPILE_S + _COMPILE_OP_S * plain.num_ticks
    pays = USUAL_GAIN * float(plain.op_seconds.sum()) * asked.steps > expected_s
    if not (asked.allow or pays):
        return (
            f"compiling would take longer than it can save within {asked.steps} steps (pass steps=, or "
            "allow_compile=True)"
        )
    if expected_s > asked.limit_s:
        return f"compiling is expected to take {expected_s:.0f} s, more than the {asked.limit_s:.0f} s that it may take"
    parameters = list(host.model.parameters())
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        return "parameters have hooks on their gradients, which a step that is only tried out would run"
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    needed = plain.timeline().peak_bytes + 3 * gradients  # two are compared, and weights moved
    free = free_bytes(host.device) if asked.limit_bytes is None else asked.limit_bytes
    if needed > free:
        return f"a real step is needed, which takes {format_bytes(needed)}: more than {format_bytes(free)}"
    return None


def _measured(
    host: Host, batch: Any, plain: Trace, method: Method, precision: float
) -> tuple[Trace, float]:
    loss_fn, undo = host.loss_fn, switch_off_cache(host.model)
    undo.then(unmark_later(host.model))
    undo.then(method.attach(Block("", Scope.MODEL, host=host)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of compilers, about their own code
            made = compiled_step(host.model, loss_fn, host.loss_fn, batch, precision)
    finally:
        undo()
    return made.priced(float(plain.op_seconds.sum())), made.compile_s
