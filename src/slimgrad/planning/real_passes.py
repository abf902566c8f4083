"""Seconds of real passes, forward and backward, of the step as it is and as methods rewrite it, in turns.

Operations timed alone know nothing of each other: what the memory's allocator does, and what one leaves in the cache
for the next, is missing in their sum. Where the plain step fits into memory, whole passes are run, and the seconds of
a trace's operations are scaled to theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from slimgrad import catalogue
from slimgrad.host import Host
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.machine import free_bytes
from slimgrad.measuring.profile import Setting
from slimgrad.measuring.stopwatch import seconds_of
from slimgrad.measuring.trace import Trace, checked_loss, untouched
from slimgrad.method import Block, Method, Scope, hyperparameters, method_name

_LEAST_S = 0.02  # passes that take less cannot be told from noise
_LEAST_ROUNDS, _ROUNDS, _MOST_ROUNDS = 2, 3, 8  # the first of them is not counted
_SHARE = 0.5  # of the memory that is free, which the plain passes may take

Variants = Mapping[tuple[Setting, ...], Trace]


def setting_of(method: Method) -> Setting:
    """A method's name and fields, as a profile or plan keeps them."""
    return (method_name(method), tuple(hyperparameters(method).items()))


def method_of(setting: Setting) -> Method:
    """The method that a setting names."""
    return catalogue.get(setting[0], **dict(setting[1]))


class attached:  # noqa: N801
    """The methods attached to the whole model within the body, in which no weight and no state gets another value.

    Afterwards every tensor is the one from before: undoing a method may give back a copy.
    """

    def __init__(self, host: Host, methods: Iterable[Method]) -> None:
        self.host, self.methods = host, list(methods)

    def __enter__(self) -> None:
        optimizer = self.host.optimizer
        self.tensors = [(p, p.data, p.grad) for p in self.host.model.parameters()]
        self.state = [(s, dict(s)) for s in optimizer.state.values()] if optimizer else []
        self.undos = [m.attach(Block("", Scope.MODEL, host=self.host)) for m in self.methods]

    def __exit__(self, *exc: Any) -> None:
        for undo in reversed(self.undos):
            undo()
        for parameter, data, gradient in self.tensors:
            parameter.data, parameter.grad = data, gradient
        for state, values in self.state:
            state.update(values)


def time_passes(
    host: Host, batch: Any, traces: Variants, *, limit_bytes: int | None, limit_s: float
) -> None:
    """Scale the seconds of ``traces`` to those of real passes, and mark them as timed so.

    The plain passes and each single rewriting method's are run, the fastest first, in turns, for about ``limit_s``
    seconds; a method saves at most what the operations take that it does away with (more is noise), and what several
    methods at once take is the product of what each of them does. Where a method leaves the operations of blocks as
    they are, the others take what it adds. A refinement that is planned to take longer claims to save nothing: what
    methods beside it save was seen, though it was not run itself. Nothing is run where the plain passes would take
    more than ``limit_bytes`` or half of the free memory, or so little time that noise would be measured.
    """
    plain = traces[()]
    planned = float(plain.op_seconds.sum())
    peak = plain.timeline().peak_bytes
    if (
        planned < _LEAST_S
        or planned * _LEAST_ROUNDS > limit_s
        or not _fits(host, peak, limit_bytes)
    ):
        return
    ways = [_Way(methods, trace) for methods, trace in traces.items() if len(methods) <= 1]
    ways.sort(key=lambda way: (bool(way.methods), way.planned_s))
    left = limit_s / _ROUNDS
    ways = [way for way in ways if (left := left - way.planned_s) > 0 or not way.methods]
    with suppress(Exception):  # what fails for real is told where it is proved
        _take_turns(ways, host, batch, limit_s)
    taken = [way for way in ways if way.taken]
    if taken and not taken[0].methods:
        scale, paces = taken[0].scale, dict[Setting, _Pace]()
        for way in taken[1:]:
            kept_s = planned - _replaced_s(plain, way.trace)
            relative = max(way.scale / scale, kept_s / way.planned_s)
            paces[way.methods[0]] = _pace(plain, way.trace, relative)
        modest = [m for m in _refinements(traces) if _planned_s(traces[m,]) >= planned]
        for methods, trace in traces.items():
            _scale(trace, [paces.get(m) for m in methods], scale)
            others = [m for m in methods if m not in modest]
            trace.is_timed = paces.keys() >= set(others or methods)


def _take_turns(ways: Sequence[_Way], host: Host, batch: Any, limit_s: float) -> None:
    """At least three rounds, though operations alone told too little by up to half; more of short passes."""
    began = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        spent_s = time.perf_counter() - began
        if turn >= _ROUNDS and spent_s * (turn + 1) / turn > limit_s:
            break
        for way in ways:
            if time.perf_counter() - began < 2 * limit_s:
                way.run(host, batch)


@dataclass
class _Way:
    """One way to run the passes: nothing attached, or one method. ``taken`` are the seconds of its runs."""

    methods: tuple[Setting, ...]
    trace: Trace
    taken: list[float] = field(default_factory=list)

    @property
    def planned_s(self) -> float:
        parts = max((dict(fields).get("num", 1) for _, fields in self.methods), default=1)
        return float(self.trace.op_seconds.sum()) * parts / self.trace.num_shares

    @property
    def scale(self) -> float:
        """Real seconds for each that was planned; the first run finds its places in memory."""
        return min(self.taken[1:] or self.taken) / self.planned_s

    def run(self, host: Host, batch: Any) -> None:
        with attached(host, map(method_of, self.methods)), untouched(host.model):
            self.taken.append(seconds_of(lambda: _passes(host, batch), host.device))


def _passes(host: Host, batch: Any) -> None:
    for share in host.split(batch):
        loss = checked_loss(host.loss_fn(host.model, share.batch))
        (loss if share.weight == 1 else loss * share.weight).backward()
        del loss


def _planned_s(trace: Trace) -> float:
    return float(trace.op_seconds.sum())


def _refinements(traces: Variants) -> list[Setting]:
    alone = [methods[0] for methods in traces if len(methods) == 1]
    return [m for m in alone if getattr(catalogue.find(m[0]), "is_refinement", False)]


def _replaced_s(plain: Trace, trace: Trace) -> float:
    """Planned seconds of the plain passes' operations that ``trace`` does not have: it cannot save more than those."""
    num = 1 + max(int(plain.op.max(initial=0)), int(trace.op.max(initial=0)))
    seconds = np.zeros(num)
    seconds[plain.op] = plain.op_seconds
    left = np.bincount(plain.op, minlength=num) - np.bincount(trace.op, minlength=num)
    return float((left.clip(min=0) * seconds).sum())


def _fits(host: Host, peak_bytes: int, limit_bytes: int | None) -> bool:
    if any(is_fake(p) for p in host.model.parameters()):
        return False
    if limit_bytes is not None and peak_bytes > limit_bytes:
        return False
    return peak_bytes <= _SHARE * free_bytes(host.device)


class _Pace(NamedTuple):
    """How many times as long as in the plain passes operations take, within blocks and outside of them."""

    inside: float
    outside: float


def _pace(plain: Trace, trace: Trace, relative: float) -> _Pace:
    """The pace at which all operations take ``relative`` times as long: of those that are not as in the plain passes."""
    is_inside = trace.op_call >= 0
    outside_s, all_s = float(trace.op_seconds[~is_inside].sum()), float(trace.op_seconds.sum())
    if not outside_s or not np.array_equal(trace.op[is_inside], plain.op[plain.op_call >= 0]):
        return _Pace(relative, relative)
    return _Pace(1.0, max(0.0, 1 + (relative - 1) * all_s / outside_s))


def _scale(trace: Trace, paces: Sequence[_Pace | None], scale: float) -> None:
    """A method that was not run (None) is as far off as plain is; several are as far off as all of them together."""
    inside, outside = (math.prod(pace[i] for pace in paces if pace) for i in range(2))
    trace.op_seconds = trace.op_seconds * scale * np.where(trace.op_call >= 0, inside, outside)
