"""Contenders: a peer, or slimgrad under a budget, set up anew for each turn and measured once at the start.

One contender's model is alive at a time. All of them together would not fit: with AdamW each holds three times its
weights, and a comparison has some thirty contenders. A turn begins from a fresh copy of the same weights and with one
step that is not timed (it makes the optimizer's state), so that nothing is left over from another's turn.
Compiled code is bound to its model: a compiled contender keeps its copy from turn to turn, in host memory and
without optimizer state.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slimgrad.comparing.meter import Memory, limited, memory_of, seconds_of
from slimgrad.comparing.peers import Peer
from slimgrad.comparing.rows import Row
from slimgrad.comparing.runner import PeerRunner, Runner, SlimRunner
from slimgrad.comparing.zoo import Subject
from slimgrad.errors import BudgetError, VerificationError
from slimgrad.measuring.profile import Profile
from slimgrad.planning.plan import Plan, plan
from slimgrad.planning.tighten import narrowed
from slimgrad.types import BudgetLike, format_bytes
from slimgrad.verifying.gradient import relative_error, same_bits

RUN_STEPS = (
    100_000  # of the run that slimgrad plans for: what compiling takes is told apart for all
)
_TIGHTENINGS = 3
_WARM_UP = 2  # the optimizer makes its state in the first, and the allocator finds its places in the second


@dataclass
class Values:
    """What one plain step gives: the measure of every contender's."""

    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


@dataclass
class Contender:
    """One row in the making. ``prepare`` measures memory and gradients, ``turn`` times a few steps."""

    row: Row
    subject: Subject
    device: torch.device
    _kept: Runner | None = field(default=None, init=False)

    @property
    def compiled(self) -> bool:
        """Whether its step is compiled."""
        return self.row.compiled

    def prepare(self, plain: Values | None) -> Values:
        """Fill in the row but for times; the values of one step. Raises whatever setting it up raises."""
        raise NotImplementedError

    def open(self) -> Runner:
        """A fresh runner."""
        raise NotImplementedError

    def turn(self, num_steps: int) -> None:
        """Time ``num_steps`` steps after some that are not counted."""
        with self._running() as runner:
            for _ in range(_WARM_UP):
                runner.step()
            self.row.times_s += [seconds_of(runner.step, self.device) for _ in range(num_steps)]

    def close(self) -> None:
        """Give up what is kept from turn to turn."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    @contextmanager
    def _running(self) -> Generator[Runner]:
        runner = self._kept or self.open()
        if self._kept is not None:
            runner.resume()
        try:
            yield runner
        except BaseException:
            runner.close()
            self._kept = None
            raise
        if self.compiled:
            runner.park()
            self._kept = runner
        else:
            runner.close()

    def _measure(self, runner: Runner, plain: Values | None) -> tuple[Values, Memory]:
        gradients = runner.gradients()
        buffers = {n: b.detach().clone().cpu() for n, b in runner.model.named_buffers()}
        values = Values(gradients, buffers)
        against = plain or values
        self.row.gradient_error = relative_error(gradients, against.gradients)
        self.row.buffers_equal = same_bits(buffers, against.buffers)
        runner.step()  # makes the optimizer's state
        memory = memory_of(runner, self.device, compiled=self.compiled)
        row = self.row
        row.peak_bytes, row.peak_from = memory.peak_bytes, memory.peak_from
        row.allocator_bytes = memory.allocator_bytes
        row.activations_bytes = memory.activations_bytes
        row.temporaries_bytes = memory.temporaries_bytes
        return values, memory


@dataclass
class PeerContender(Contender):
    """Plain training or a peer. ``limit_s`` bounds what a compiler may take before it is given up."""

    peer: Peer
    limit_s: float | None = None

    def open(self) -> Runner:
        """The peer on a fresh copy."""
        return PeerRunner(self.peer, self.subject, self.device)

    def prepare(self, plain: Values | None) -> Values:
        """Measure memory and gradients; of compiled steps, the seconds until the first one is done too."""
        if not self.compiled:
            with self._running() as runner:
                return self._measure(runner, plain)[0]
        try:
            with limited(self.limit_s), self._running() as runner:
                self._compile(runner)
                return self._measure(runner, plain)[0]
        except BaseException:
            torch._dynamo.reset()  # what failed would make the next one run uncompiled, silently
            raise

    def _compile(self, runner: Runner) -> None:
        before = _num_graphs()
        state = {n: b.detach().clone() for n, b in runner.model.named_buffers()}
        self.row.compile_s = seconds_of(runner.gradients, self.device)
        for name, buffer in runner.model.named_buffers():
            buffer.copy_(state[name])
        num_graphs = _num_graphs() - before
        if num_graphs == 0:
            raise RuntimeError("nothing was compiled: PyTorch fell back to running it as it is")
        if num_graphs > 1:
            self.row.note = f"{num_graphs} graphs"


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@dataclass
class SlimContender(Contender):
    """slimgrad under a budget, planned from a profile, tightened where measuring shows the plan over it.

    With ``error`` above zero of the rung ``approximate``, that relative L2 error of the whole gradient allowed.
    """

    profile: Profile
    budget: BudgetLike
    allow_compile: bool = False
    error: float = 0.0
    plan: Plan | None = field(default=None, init=False)

    def open(self) -> Runner:
        """The plan applied to a fresh copy."""
        assert self.plan is not None
        return SlimRunner(self.plan, self.subject, self.device)

    def prepare(self, plain: Values | None) -> Values:
        """Plan, apply, measure; plan again for less where peak or gradient error is above what was asked for."""
        reserve, over, error = 0, 0, self.error
        for number in range(_TIGHTENINGS):
            self._plan(reserve, error)
            assert self.plan is not None
            with self._running() as runner:
                values, memory = self._measure(runner, plain)
            over = 0 if self.plan.budget == "min" else memory.peak_bytes - self.plan.budget_bytes
            found = self.row.gradient_error or 0.0
            is_last = number + 1 == _TIGHTENINGS
            if over <= 0 and (not self.error or found <= self.error or is_last):
                return (
                    values  # an error that no smaller one lowers is of rounding: the row tells it
                )
            if over > 0:
                reserve += max(over, self.plan.budget_bytes // 1000)
            if self.error and found > self.error:
                error = narrowed(error, self.error, found)
        raise VerificationError(
            f"the measured peak stays {format_bytes(over)} above the budget after {_TIGHTENINGS} plans"
        )

    def _plan(self, reserve: int, allowed: float) -> None:
        row, begin = self.row, time.perf_counter()
        rung: dict[str, Any] = {"exactness": "approximate", "error": allowed} if allowed else {}
        try:
            made = plan(
                self.profile,
                self.budget,
                reserve_bytes=reserve,
                allow_compile=self.allow_compile,
                steps=RUN_STEPS,
                **rung,
            )
        except BudgetError as error:
            row.smallest_bytes = error.smallest_bytes
            raise
        self.plan = replace(made, tightened_bytes=reserve)
        row.planning_s = (row.planning_s or 0.0) + time.perf_counter() - begin
        row.tightened_bytes, row.predicted_peak_bytes = reserve, made.peak_bytes
        row.predicted_s = made.seconds
        row.predicted_time_ratio = made.seconds / made.plain_seconds if made.plain_seconds else None
        row.methods = sorted({choice.method for choice in made.choices})
        row.predicted_error = made.predicted_error if allowed else None


def described(error: BaseException) -> str:
    """An error as one line; of a budget that nothing fits, the smallest one that something does."""
    if isinstance(error, BudgetError):
        return f"BudgetError: does not fit, at least {format_bytes(error.smallest_bytes)} is needed"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]
