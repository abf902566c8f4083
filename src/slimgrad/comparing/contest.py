"""The comparison: every contender on every model, in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from slimgrad.comparing.contenders import (
    RUN_STEPS,
    Contender,
    PeerContender,
    SlimContender,
    Values,
    described,
)
from slimgrad.comparing.peers import PLAIN, Peer
from slimgrad.comparing.rows import Row, measured_on, today
from slimgrad.comparing.runner import PeerRunner
from slimgrad.comparing.zoo import SIZES, ZOO, Subject, check_name, subject
from slimgrad.measuring.profile import Profile
from slimgrad.planning.profiling import measure
from slimgrad.types import Budget, format_bytes

BUDGETS = ("100%", "80%", "60%", "50%", "40%", "30%", "min")
_THOUSANDTH = 1000  # of a peer's peak that a plan for it may need more
Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Contest:
    """What is compared: models and peers by name, budgets, rounds of turns and timed steps a turn.

    ``compile_limit_s`` bounds what compiling one model may take. Everything runs on ``device``. With
    ``allow_compile`` slimgrad may compile blocks, but not where it is held against a peer that compiles nothing.
    With ``error`` above zero slimgrad is planned for each budget a second time, of the rung ``approximate`` with
    that relative L2 error of the whole gradient allowed.
    """

    models: Sequence[str] = tuple(ZOO)
    peers: Sequence[Peer] = ()
    budgets: Sequence[str] = BUDGETS
    rounds: int = 3
    steps: int = 1
    size: str = SIZES[1]
    compile_limit_s: float | None = 300.0
    allow_compile: bool = True
    error: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for name in self.models:
            check_name(name)
        for budget in self.budgets:
            Budget.parse(budget)
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(
                f"expected rounds and steps of at least 1, not {self.rounds}, {self.steps}"
            )
        if not 0 <= self.error < 1:
            raise ValueError(f"expected an error of a gradient in [0, 1), not {self.error}")


def run(contest: Contest, say: Say = lambda _: None) -> Iterator[list[Row]]:
    """The rows of each model, once that model is done. What fails is a row with its error, never raised.

    Plain training and the peers come first; slimgrad is then planned for the budgets asked for and for what each
    peer was measured to need, to within a thousandth (``slimgrad@peer``); then all are timed in turns.
    """
    stamp: dict[str, Any] = {"machine": measured_on(contest.device), "date": today()}
    for name in contest.models:
        rows = _Model(contest, name, say).rows()
        for row in rows:
            row.machine, row.date = stamp["machine"], stamp["date"]
        yield rows


class _Model:
    """One model's part of a contest."""

    def __init__(self, contest: Contest, name: str, say: Say) -> None:
        self.contest, self.name, self._say = contest, name, say
        self.plain: Values | None = None
        self.entered: list[Contender] = []
        self.made: list[Row] = []

    def rows(self) -> list[Row]:
        try:
            made = subject(self.name, self.contest.size)
        except Exception as error:
            row = Row(self.name, PLAIN.name, "plain", error=described(error))
            self._say(f"{self.name}: left out, {row.error}")
            return [row]
        try:
            self._enter(made)
            self._take_turns()
        finally:
            for contender in self.entered:
                contender.close()
            if any(peer.compiled for peer in self.contest.peers):
                torch._dynamo.reset()  # compiled code of another model is not looked for again
        plain = self.made[0]
        for row in self.made:
            row.compare(plain)
        return self.made

    def _enter(self, made: Subject) -> None:
        self._warm(made)
        self.plain = self._prepared(self._peer(PLAIN, "plain", made))
        if self.plain is None:
            return
        peers = [self._peer(peer, "peer", made) for peer in self.contest.peers]
        for contender in peers:
            if contender.compiled and self._compiles_too_long():
                contender.row.error = "not tried: compiling this model takes too long"
                self.made.append(contender.row)
            else:
                self._prepared(contender)
        profile = self._profiled(made)
        if profile is None:
            return
        for budget in self.contest.budgets:
            self._prepared(self._slim(f"slimgrad {budget}", budget, budget, made, profile))
            if self.contest.error:
                name = f"approximate {budget}"
                error = self.contest.error
                self._prepared(self._slim(name, budget, budget, made, profile, error=error))
        for row in [contender.row for contender in peers]:
            peak = row.peak_like(self.made[0])
            if peak is not None and row.error is None:
                name = f"slimgrad@{row.contender}"
                text, compiles = format_bytes(peak), row.compiled
                peak += peak // _THOUSANDTH
                self._prepared(self._slim(name, text, peak, made, profile, compiles=compiles))

    def _compiles_too_long(self) -> bool:
        """Whether compiling was given up for one peer: each of the others would take as long."""
        return any(r.compiled and (r.error or "").startswith("TimeoutError") for r in self.made)

    def _warm(self, made: Subject) -> None:
        """On CUDA libraries keep workspaces from their first use on: let them be there before the first contender."""
        if self.contest.device.type != "cuda":
            return
        with suppress(Exception):  # what fails here fails again below, where it is noted
            runner = PeerRunner(PLAIN, made, self.contest.device)
            runner.step()
            runner.close()

    def _peer(self, peer: Peer, kind: str, made: Subject) -> Contender:
        row = Row(self.name, peer.name, kind, compiled=peer.compiled, note=made.note)
        return PeerContender(row, made, self.contest.device, peer, self.contest.compile_limit_s)

    def _slim(
        self,
        name: str,
        text: str,
        budget: str | int,
        made: Subject,
        profile: Profile,
        *,
        compiles: bool = True,
        error: float = 0.0,
    ) -> SlimContender:
        kind = "approximate" if error else "slimgrad"
        row = Row(self.name, name, kind, budget=text, note=made.note)
        compiles = compiles and self.contest.allow_compile
        return SlimContender(row, made, self.contest.device, profile, budget, compiles, error)

    def _profiled(self, made: Subject) -> Profile | None:
        row, begin = self.made[0], time.perf_counter()
        copy = PeerRunner(PLAIN, made, self.contest.device)
        allow = None if self.contest.allow_compile else False
        profile = self._tried(
            row,
            lambda: measure(
                copy.model,
                copy.optimizer,
                made.loss_fn,
                copy.batch,
                allow_compile=allow,
                steps=RUN_STEPS,
                compile_limit_s=self.contest.compile_limit_s or math.inf,
                sensitivity=self.contest.error > 0,
            ),
        )
        copy.close()
        if profile is None:
            row.note, row.error = f"slimgrad measured nothing: {row.error}", None
            return None
        row.measuring_s = time.perf_counter() - begin
        row.predicted_peak_bytes, row.predicted_s = profile.peak_bytes, profile.seconds
        row.predicted_time_ratio = 1.0
        self._say(f"{self.name}: measured by slimgrad in {row.measuring_s:.1f} s")
        return profile

    def _prepared(self, contender: Contender) -> Values | None:
        row = contender.row
        self.made.append(row)
        values = self._tried(row, lambda: contender.prepare(self.plain))
        if values is not None:
            self.entered.append(contender)
            compiled = "" if row.compile_s is None else f", compiled in {row.compile_s:.0f} s"
            predicted = (
                ""
                if row.predicted_peak_bytes is None
                else f", predicted {format_bytes(row.predicted_peak_bytes)}"
            )
            self._say(
                f"{self.name}: {row.contender}: peak {format_bytes(row.peak_bytes or 0)}{predicted}{compiled}"
            )
        return values

    def _take_turns(self) -> None:
        for turn in range(self.contest.rounds):
            self._say(
                f"{self.name}: round {turn + 1} of {self.contest.rounds}, {len(self.entered)} contenders"
            )
            order = list(self.entered)
            random.Random(turn).shuffle(order)  # so that no contender always follows another
            for contender in order:
                done = self._tried(contender.row, lambda c=contender: self._turn(c))
                if done is None:
                    self.entered.remove(contender)

    def _turn(self, contender: Contender) -> bool:
        contender.turn(self.contest.steps)
        return True

    def _tried(self, row: Row, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:
            row.error = described(error)
            self._say(f"{self.name}: {row.contender}: {row.error}")
        return None
