"""Chooses an option for each block: least seconds under the budget, or least peak.

A mixed-integer programme (HiGHS, through SciPy). Live bytes at a slot are linear in the choices, so the
programme is exact except for border tensors kept alive by several blocks at once, which it counts once for
each. Only the slots that can bind are written down: the programme starts with the highest of each stretch of
the step, its answer is replayed, slots found above the budget are added, and it is solved again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from slimgrad.method import Restore
from slimgrad.planning.calls import Changes
from slimgrad.planning.offers import Option, Scheme
from slimgrad.planning.simulate import Layout

_STRETCHES = 48
_ROUNDS = 25
_TIGHTENINGS = 8


@dataclass(frozen=True)
class Solution:
    """The options chosen in one scheme, with the replayed peak and the seconds of a step."""

    scheme: Scheme
    layout: Layout
    options: tuple[Option, ...]
    changes: Changes
    peak_bytes: int
    seconds: float


class Programme:
    """One scheme's blocks and options as matrices, ready to be solved for any budget."""

    def __init__(self, scheme: Scheme, layout: Layout, options: list[Option]) -> None:
        self.scheme, self.layout, self.options = scheme, layout, options
        self.fixed_changes = layout.model_changes(scheme.record)
        self.fixed = layout.base_live + layout.live(self.fixed_changes)
        self.effects = np.array(
            [layout.live(self._alone(option)) for option in options], dtype=np.float64
        ).reshape(len(options), layout.num_slots)
        self.added_s = np.array([option.added_s for option in options])
        paths = sorted({option.path for option in options})
        self.one_of = np.array([[o.path == path for o in options] for path in paths], dtype=float)
        self.edges = np.linspace(0, layout.num_slots, _STRETCHES + 1).astype(int)

    @property
    def most_saved_s(self) -> float:
        """What the options that are faster than plain blocks save at most."""
        if not self.options:
            return 0.0
        faster = np.minimum(self.added_s, 0.0)
        return -float((self.one_of * faster).min(axis=1).sum())

    def _alone(self, option: Option) -> Changes:
        changes = Changes()
        changes.extend(self.layout.block_changes(option.path, option.record))
        changes.extend(self.layout.hold_changes(self.layout.held(option.path, option.record)))
        return changes

    def replay(self, chosen: np.ndarray) -> tuple[np.ndarray, Changes]:
        """Live bytes at every slot under the chosen options, border tensors counted once; and the changes."""
        changes, held = Changes(), dict[int, int]()
        changes.extend(self.fixed_changes)
        picked = [self.options[index] for index in np.flatnonzero(chosen)]
        offloaded = [
            call
            for option in picked
            if option.record.restore is Restore.COPY
            for call in self.layout.blocks[option.path].calls
            if call in self.layout.window
        ]
        for option in picked:
            changes.extend(self.layout.block_changes(option.path, option.record, offloaded))
            for storage, stop in self.layout.held(option.path, option.record).items():
                held[storage] = max(held.get(storage, 0), stop)
        changes.extend(self.layout.hold_changes(held))
        return self.layout.base_live + self.layout.live(changes), changes

    def least_seconds(self, budget_bytes: int) -> Solution | None:
        """The fastest choice whose replayed peak fits; None if there is none.

        Where the replay finds more than the programme did, the programme is given that much less room.
        """
        room = budget_bytes
        for _ in range(_TIGHTENINGS):
            found = self._solve(lambda slots, room=room: self._fit(slots, room), room)
            if found is None or found.peak_bytes <= budget_bytes:
                return found
            room -= found.peak_bytes - budget_bytes
        return None

    def least_peak(self) -> Solution:
        """The choice with the lowest peak; among those, a fast one."""
        lowest = self._solve(self._flatten, None)
        assert lowest is not None
        return self.least_seconds(lowest.peak_bytes) or lowest

    def _solve(
        self, solver: Callable[[list[int]], np.ndarray | None], budget_bytes: int | None
    ) -> Solution | None:
        num = len(self.options)
        slots = self._highest(self.fixed) | self._highest(self._all_effects())
        best: Solution | None = None
        for _ in range(_ROUNDS):
            chosen = solver(sorted(slots)) if num else np.zeros(0)
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
                else self._linear_peak(chosen, sorted(slots))
            )
            added = {s for s in self._highest(live) if live[s] > bound} - slots
            if not added:
                break
            slots |= added
        return best

    def _linear_peak(self, chosen: np.ndarray, slots: list[int]) -> float:
        return float((self.fixed[slots] + chosen @ self.effects[:, slots]).max())

    def _all_effects(self) -> np.ndarray:
        """Live bytes with the first option of every block."""
        if not self.options:
            return self.fixed
        first = self.one_of.argmax(axis=1)
        return self.fixed + self.effects[first].sum(axis=0)

    def _highest(self, live: np.ndarray) -> set[int]:
        spans = zip(self.edges[:-1], self.edges[1:], strict=True)
        return {int(a + live[a:b].argmax()) for a, b in spans if b > a}

    def _fit(self, slots: list[int], budget_bytes: int) -> np.ndarray | None:
        """Least seconds with the live bytes at ``slots`` within the budget."""
        scale = max(float(budget_bytes), 1.0)
        room = _at_most(
            self.effects[:, slots].T / scale, (budget_bytes - self.fixed[slots]) / scale
        )
        one = _at_most(self.one_of, np.ones(len(self.one_of)))
        answer = milp(
            self.added_s + 1e-9,
            constraints=[room, one],
            integrality=np.ones(len(self.options)),
            bounds=Bounds(0, 1),
            options={"time_limit": 5.0, "mip_rel_gap": 1e-3},
        )
        return None if answer.x is None else np.round(answer.x)

    def _flatten(self, slots: list[int]) -> np.ndarray | None:
        """Least highest live bytes over ``slots``."""
        num, scale = len(self.options), max(float(self.fixed.max()), 1.0)
        below = np.hstack((self.effects[:, slots].T / scale, -np.ones((len(slots), 1))))
        answer = milp(
            np.append(self.added_s * 1e-6 / max(float(np.abs(self.added_s).sum()), 1e-12), 1.0),
            constraints=[
                _at_most(below, -self.fixed[slots] / scale),
                _at_most(
                    np.hstack((self.one_of, np.zeros((len(self.one_of), 1)))),
                    np.ones(len(self.one_of)),
                ),
            ],
            integrality=np.append(np.ones(num), 0),
            bounds=Bounds(
                np.zeros(num + 1),  # pyright: ignore[reportArgumentType]: typed as one number
                np.append(np.ones(num), np.inf),  # pyright: ignore[reportArgumentType]
            ),
            options={"time_limit": 5.0, "mip_rel_gap": 1e-3},
        )
        return None if answer.x is None else np.round(answer.x[:num])

    def _solution(self, chosen: np.ndarray, changes: Changes, peak: int) -> Solution:
        picked = tuple(self.options[i] for i in np.flatnonzero(chosen))
        seconds = self.scheme.seconds + sum(o.added_s for o in picked)
        return Solution(self.scheme, self.layout, picked, changes, peak, seconds)


def _at_most(matrix: np.ndarray, upper: np.ndarray) -> LinearConstraint:
    """``matrix @ x <= upper``, row by row."""
    return LinearConstraint(matrix, ub=upper)  # pyright: ignore[reportArgumentType]: typed as one number
