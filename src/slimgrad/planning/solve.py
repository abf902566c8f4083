"""Chooses an option for each block: least seconds under the budget, or least peak.

A mixed-integer programme (HiGHS, through SciPy). Live bytes at a slot are linear in the choices, so the
programme is exact except for border tensors kept alive by several blocks at once, which it counts once for
each. Only the slots that can bind are written down: the programme starts with the highest of each stretch of
the step, its answer is replayed, slots found above the budget are added, and it is solved again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array, hstack

from slimgrad.integer_programs import PATIENCE, at_most, solve
from slimgrad.planning.calls import Changes
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Option, Scheme
from slimgrad.planning.simulate import Layout

_STRETCHES = 48
_ROUNDS = 25
_TIGHTENINGS = 8
GAP = 1e-3  # of the whole step's seconds, or of the peak
_LIMIT_S = 1.5
_SEARCH_S = 0.5
_TRIALS = 120  # of the search for a lower peak


@dataclass(frozen=True)
class Solution:
    """The options chosen in one scheme, with the replayed peak and the seconds of a step."""

    scheme: Scheme
    layout: Layout
    options: tuple[Option, ...]
    changes: Changes
    peak_bytes: int
    seconds: float
    chosen: np.ndarray  # as ones and zeros, one for each of the programme's unknowns
    bound_s: float = (
        0.0  # no choice that fits is faster, border tensors counted once for each block
    )


class Programme:
    """One scheme with its menu of options, ready to be solved for any budget.

    The unknowns are the menu's bundles. Codes may bring ``error`` to the gradient (relative L2) and take ``coding_s``.
    """

    def __init__(
        self, scheme: Scheme, menu: Menu, error: float = 0.0, coding_s: float = np.inf
    ) -> None:
        self.scheme, self.menu, self.layout = scheme, menu, menu.layout
        # the squared errors of single blocks add up: their codes err independently
        self._spent = [(menu.squared_errors, error**2)]
        if coding_s < np.inf:
            self._spent.append((menu.coding_s, coding_s))
        self.bundles, self.added_s = menu.bundles, menu.added_s
        self.fixed_changes = self.layout.model_changes(scheme.record)
        self.fixed = self.layout.base_live + self.layout.live(self.fixed_changes)
        self.edges = np.linspace(0, self.layout.num_slots, _STRETCHES + 1).astype(int)
        self.slots = self._highest(self.fixed) | self._highest(self.fixed + menu.of_the_first)

    def replay(self, chosen: np.ndarray) -> tuple[np.ndarray, Changes]:
        """Live bytes at every slot under the chosen bundles, border tensors counted once; and the changes."""
        changes = Changes()
        changes.extend(self.fixed_changes)
        changes.extend(self.menu.changes(chosen))
        return self.layout.base_live + self.layout.live(changes), changes

    def least_seconds(self, budget_bytes: int, patience: float = PATIENCE) -> Solution | None:
        """The fastest choice whose replayed peak fits; None if there is none, or ``patience`` ran out.

        Where the replay finds more than the programme did, the programme is given that much less room.
        """
        room = budget_bytes
        for _ in range(_TIGHTENINGS):
            found = self._solve(
                lambda slots, room=room: self._fit(slots, room, patience=patience), room
            )
            if found is None or found.peak_bytes <= budget_bytes:
                return found and self._improved(found, budget_bytes)
            room -= found.peak_bytes - budget_bytes
        return None

    def least_peak(self) -> Solution:
        """The choice with the lowest peak, and among those a fast one."""
        return self.made_faster(self.lowest())

    def lowest(self) -> Solution:
        """The choice with the lowest peak, however long it takes."""
        found = self._solve(self._flatten, None)
        assert found is not None
        return self._lowered(found)

    def made_faster(self, lean: Solution) -> Solution:
        """A fast choice whose peak is no higher than that of ``lean``: of local search, or of one short solve."""
        improved = self._improved(lean, lean.peak_bytes)
        solved = self.least_seconds(lean.peak_bytes, patience=1)
        return solved if solved is not None and solved.seconds < improved.seconds else improved

    # -- parts of choices: bounds, and the slots that bind --------------------------------------------

    def relaxed_seconds(self, budget_bytes: int) -> float | None:
        """Seconds below which no choice fits, parts of choices allowed; None if not even those fit."""
        found = self._relax(lambda slots: self._fit(slots, budget_bytes, whole=False), budget_bytes)
        return None if found is None else self.scheme.seconds + float(found @ self.added_s)

    def relaxed_peak(self) -> float:
        """The lowest peak, parts of choices allowed, less a little."""
        found = self._relax(lambda slots: self._flatten(slots, whole=False), None)
        assert found is not None
        return self._linear_peak(found, sorted(self.slots)) * (1 - GAP)

    def _relax(
        self, solver: Callable[[list[int]], np.ndarray | None], budget_bytes: int | None
    ) -> np.ndarray | None:
        found: np.ndarray | None = None
        for _ in range(_ROUNDS):
            found = solver(sorted(self.slots)) if self.bundles else np.zeros(0)
            if found is None:
                return None
            live = self._linear_live(found)
            bound = (
                self._linear_peak(found, sorted(self.slots))
                if budget_bytes is None
                else budget_bytes
            )
            added = {s for s in self._highest(live) if live[s] > bound * (1 + GAP)} - self.slots
            if not added:
                break
            self.slots |= added
        return found

    def _linear_live(self, parts: np.ndarray) -> np.ndarray:
        """Live bytes at every slot, were parts of choices possible."""
        slots, num_bytes = list[np.ndarray](), list[np.ndarray]()
        for index in np.flatnonzero(parts > 1e-9):
            effect = self.menu.effects[index]
            slots.append(effect.slot)
            num_bytes.append(np.diff(effect.sums) * parts[index])
        if not slots:
            return self.fixed
        total = np.bincount(
            np.concatenate(slots), np.concatenate(num_bytes), self.layout.num_slots + 1
        )
        return self.fixed + np.cumsum(total)[: self.layout.num_slots]

    # -- whole choices ----------------------------------------------------------------------------------

    def _solve(
        self, solver: Callable[[list[int]], np.ndarray | None], budget_bytes: int | None
    ) -> Solution | None:
        best: Solution | None = None
        for _ in range(_ROUNDS):
            chosen = solver(sorted(self.slots)) if self.bundles else np.zeros(0)
            if chosen is None:
                return None if budget_bytes is not None else best
            live, changes = self.replay(chosen)
            peak = int(live.max())
            if best is None or peak < best.peak_bytes or budget_bytes is not None:
                best = self._solution(chosen, changes, peak)
            if budget_bytes is not None and peak <= budget_bytes:
                return best
            bound = (
                budget_bytes
                if budget_bytes is not None
                else self._linear_peak(chosen, sorted(self.slots))
            )
            added = {s for s in self._highest(live) if live[s] > bound} - self.slots
            if not added:
                break
            self.slots |= added
        return best

    def _improved(self, found: Solution, budget_bytes: int) -> Solution:
        """Local search: each choice in turn made cheaper or left out, where the replay says that it still fits.

        The programme counts a border tensor that several choices keep alive once for each; the replay counts it once.
        """
        began, chosen = time.perf_counter(), found.chosen.copy()
        covers = self.menu.covers
        for index in sorted(np.flatnonzero(chosen), key=lambda i: -self.added_s[i]):
            others = [i for i, c in enumerate(covers) if c == covers[index]]
            cheaper = sorted(
                (i for i in others if self.added_s[i] < self.added_s[index]),
                key=lambda i: self.added_s[i],
            )
            for other in [None, *cheaper] if self.added_s[index] > 0 else cheaper:
                if time.perf_counter() - began > _SEARCH_S:
                    return found
                trial = chosen.copy()
                trial[index] = 0
                if other is not None:
                    trial[other] = 1
                if not self._is_within(trial):
                    continue
                live, changes = self.replay(trial)
                if live.max() <= budget_bytes:
                    chosen, found = trial, self._solution(trial, changes, int(live.max()))
                    break
        return found

    def _lowered(self, found: Solution) -> Solution:
        """Local search: a bundle put in place of those that decide about the same blocks, or left out, where the
        replayed peak falls by it.

        What frees most at the highest slot is tried first; the programme counts shared border tensors too often.
        """
        trials, covers = 0, self.menu.covers
        while trials < _TRIALS:
            live, _ = self.replay(found.chosen)
            effects = self.menu.at([int(live.argmax())])[:, 0] if self.bundles else np.zeros(0)
            gain = np.where(found.chosen > 0, effects, -effects)
            lower = None
            for index in np.argsort(-gain, kind="stable"):
                if trials >= _TRIALS:
                    break
                trial = found.chosen.copy()
                if not trial[index]:
                    for other in np.flatnonzero(trial):
                        if covers[other] & covers[index]:
                            trial[other] = 0
                trial[index] = 1 - trial[index]
                if not self._is_within(trial):
                    continue
                trials += 1
                changed, changes = self.replay(trial)
                if changed.max() < found.peak_bytes:
                    lower = self._solution(trial, changes, int(changed.max()))
                    break
            if lower is None:
                break
            found = lower
        return found

    def _linear_peak(self, chosen: np.ndarray, slots: list[int]) -> float:
        return float((self.fixed[slots] + chosen @ self.menu.at(slots)).max())

    def _highest(self, live: np.ndarray) -> set[int]:
        spans = zip(self.edges[:-1], self.edges[1:], strict=True)
        return {int(a + live[a:b].argmax()) for a, b in spans if b > a}

    def _fit(
        self, slots: list[int], budget_bytes: int, *, whole: bool = True, patience: float = PATIENCE
    ) -> np.ndarray | None:
        """Least seconds with the live bytes at ``slots`` within the budget."""
        num, scale = len(self.bundles), max(float(budget_bytes), 1.0)
        room = (budget_bytes - self.fixed[slots]) / scale
        answer = solve(
            self.added_s + 1e-9,
            [at_most(self.menu.at(slots).T / scale, room), self._one_each(), *self._limits()],
            is_integer=np.full(num, whole),
            upper=np.ones(num),
            gap=GAP,
            limit_s=_LIMIT_S,
            patience=patience,
            constant=self.scheme.seconds,
        )
        return None if answer is None else np.round(answer) if whole else answer

    def _flatten(self, slots: list[int], *, whole: bool = True) -> np.ndarray | None:
        """Least highest live bytes over ``slots``."""
        num, scale = len(self.bundles), max(float(self.fixed.max()), 1.0)
        below = np.hstack((self.menu.at(slots).T / scale, -np.ones((len(slots), 1))))
        answer = solve(
            np.append(self.added_s * 1e-6 / max(float(np.abs(self.added_s).sum()), 1e-12), 1.0),
            [
                at_most(below, -self.fixed[slots] / scale),
                self._one_each(1),
                *self._limits(1),
            ],
            is_integer=np.append(np.full(num, whole), 0),
            upper=np.append(np.ones(num), np.inf),
            gap=GAP,
            limit_s=_LIMIT_S,
        )
        return None if answer is None else np.round(answer[:num]) if whole else answer[:num]

    def _limits(self, num_more: int = 0) -> list[LinearConstraint]:
        """What codes bring of error and take of seconds within what is allowed, where any choice has some."""
        found: list[LinearConstraint] = []
        for spent, allowed in self._spent:
            if spent.any():
                scale = max(allowed, 1e-300)
                row = np.concatenate((spent / scale, np.zeros(num_more)))
                found.append(at_most(row[None, :], np.array([allowed / scale])))
        return found

    def _is_within(self, chosen: np.ndarray) -> bool:
        return all(float(chosen @ s) <= allowed * (1 + 1e-9) for s, allowed in self._spent)

    def _one_each(self, num_more: int = 0) -> LinearConstraint:
        """At most one bundle decides about each block; ``num_more`` unknowns follow."""
        num = self.menu.num_rows
        rows = (
            hstack((self.menu.one_of, csr_array((num, num_more)))) if num_more else self.menu.one_of
        )
        return at_most(rows, np.ones(num))

    def _solution(self, chosen: np.ndarray, changes: Changes, peak: int) -> Solution:
        picked = self.menu.picked(chosen)
        seconds = self.scheme.seconds + sum(o.added_s for o in picked)
        return Solution(self.scheme, self.layout, picked, changes, peak, seconds, chosen)
