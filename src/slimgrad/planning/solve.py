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

from slimgrad.integer_programs import at_most, solve
from slimgrad.method import Restore
from slimgrad.planning.calls import Changes
from slimgrad.planning.offers import Option, Scheme
from slimgrad.planning.runs import chains, unit
from slimgrad.planning.simulate import Layout

_STRETCHES = 48
_ROUNDS = 25
_TIGHTENINGS = 8
_GAP = 1e-3  # of the whole step's seconds, or of the peak
_LIMIT_S = 1.5
_SEARCH_S = 0.5


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
    bound_s: float  # no choice that fits is faster, border tensors counted once for each block


class _Effect:
    """What one choice changes in the live bytes, at any slots."""

    def __init__(self, changes: Changes) -> None:
        slot, nbytes = np.array(changes.slot, dtype=np.int64), np.array(changes.nbytes)
        order = np.argsort(slot, kind="stable")
        self.slot = slot[order]
        self.sums = np.concatenate(([0.0], np.cumsum(nbytes[order], dtype=np.float64)))

    def at(self, slots: list[int]) -> np.ndarray:
        """Bytes above what is live without the choice, one entry a slot."""
        return self.sums[np.searchsorted(self.slot, slots, side="right")]


class Programme:
    """One scheme's blocks and options as matrices, ready to be solved for any budget.

    The unknowns are *bundles*: one option each, or in a chain of very many blocks one option on each of several.
    """

    def __init__(self, scheme: Scheme, layout: Layout, options: list[Option]) -> None:
        self.scheme, self.layout, self.options = scheme, layout, options
        self.bundles = _bundles(layout, options)
        self.fixed_changes = layout.model_changes(scheme.record)
        self.fixed = layout.base_live + layout.live(self.fixed_changes)
        self._changes = {id(option): self._alone(option) for option in options}
        self.effects = [_Effect(self._together(bundle)) for bundle in self.bundles]
        self.added_s = np.array([sum(o.added_s for o in bundle) for bundle in self.bundles])
        self.one_of, self.num_rows = self._covered()
        self.bound_s = np.inf  # seconds below which nothing fits, once that was asked for
        self.edges = np.linspace(0, layout.num_slots, _STRETCHES + 1).astype(int)
        self.slots = self._highest(self.fixed) | self._highest(self._all_effects())

    @property
    def most_saved_s(self) -> float:
        """What the options that are faster than plain blocks save at most."""
        added, (rows, bundles) = np.zeros(self.num_rows), self.one_of.nonzero()
        np.minimum.at(added, rows, self.added_s[bundles])
        return -float(added.sum())

    def _alone(self, option: Option) -> Changes:
        changes = Changes()
        changes.extend(self.layout.block_changes(option.where, option.record))
        changes.extend(self.layout.hold_changes(self.layout.held(option.where, option.record)))
        return changes

    def _together(self, bundle: tuple[Option, ...]) -> Changes:
        changes = Changes()
        for option in bundle:
            changes.extend(self._changes[id(option)])
        return changes

    def _covered(self) -> tuple[csr_array, int]:
        """A row for each block, or blocks that the same bundles decide about; ones where a bundle does."""
        deciding: dict[str, list[int]] = {}
        for index, bundle in enumerate(self.bundles):
            for option in bundle:
                for path in option.covers:
                    deciding.setdefault(path, []).append(index)
        rows = sorted({tuple(columns) for columns in deciding.values()})
        entries = [(i, column) for i, columns in enumerate(rows) for column in columns]
        where = np.array(entries, dtype=int).reshape(-1, 2).T
        shape = (len(rows), len(self.bundles))
        return csr_array((np.ones(len(entries)), where), shape=shape), len(rows)

    def replay(self, chosen: np.ndarray) -> tuple[np.ndarray, Changes]:
        """Live bytes at every slot under the chosen bundles, border tensors counted once; and the changes."""
        changes, held = Changes(), dict[int, int]()
        changes.extend(self.fixed_changes)
        picked = self._picked(chosen)
        offloaded = [
            call
            for option in picked
            if option.record.restore is Restore.COPY
            for call in self.layout.block(option.where).calls
            if call in self.layout.window
        ]
        for option in picked:
            changes.extend(self.layout.block_changes(option.where, option.record, offloaded))
            for storage, stop in self.layout.held(option.where, option.record).items():
                held[storage] = max(held.get(storage, 0), stop)
        changes.extend(self.layout.hold_changes(held))
        return self.layout.base_live + self.layout.live(changes), changes

    def _picked(self, chosen: np.ndarray) -> tuple[Option, ...]:
        return tuple(option for index in np.flatnonzero(chosen) for option in self.bundles[index])

    def least_seconds(self, budget_bytes: int, below_s: float = np.inf) -> Solution | None:
        """The fastest choice whose replayed peak fits, if it takes less than ``below_s``; None if there is none.

        Where the replay finds more than the programme did, the programme is given that much less room.
        """
        bound = self.relaxed_seconds(budget_bytes)
        if bound is None or bound >= below_s:
            return None
        self.bound_s = bound
        room = budget_bytes
        for _ in range(_TIGHTENINGS):
            found = self._solve(lambda slots, room=room: self._fit(slots, room), room)
            if found is None or found.peak_bytes <= budget_bytes:
                return found and self._improved(found, budget_bytes)
            room -= found.peak_bytes - budget_bytes
        return None

    def least_peak(self, below_bytes: float = np.inf) -> Solution | None:
        """The choice with the lowest peak, and among those a fast one, if it is lower than ``below_bytes``."""
        if self.relaxed_peak() >= below_bytes:
            return None
        lowest = self._solve(self._flatten, None)
        assert lowest is not None
        return self.least_seconds(lowest.peak_bytes) or lowest

    # -- parts of choices: bounds, and the slots that bind --------------------------------------------

    def relaxed_seconds(self, budget_bytes: int) -> float | None:
        """Seconds below which no choice fits, parts of choices allowed; None if not even those fit."""
        found = self._relax(lambda slots: self._fit(slots, budget_bytes, whole=False), budget_bytes)
        return None if found is None else self.scheme.seconds + float(found @ self.added_s)

    def relaxed_peak(self) -> float:
        """The lowest peak, parts of choices allowed, less a little."""
        found = self._relax(lambda slots: self._flatten(slots, whole=False), None)
        assert found is not None
        return self._linear_peak(found, sorted(self.slots)) * (1 - _GAP)

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
            added = {s for s in self._highest(live) if live[s] > bound * (1 + _GAP)} - self.slots
            if not added:
                break
            self.slots |= added
        return found

    def _linear_live(self, parts: np.ndarray) -> np.ndarray:
        """Live bytes at every slot, were parts of choices possible."""
        slots, num_bytes = list[np.ndarray](), list[np.ndarray]()
        for index in np.flatnonzero(parts > 1e-9):
            effect = self.effects[index]
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
        covers = [frozenset(p for o in bundle for p in o.covers) for bundle in self.bundles]
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
                live, changes = self.replay(trial)
                if live.max() <= budget_bytes:
                    chosen, found = trial, self._solution(trial, changes, int(live.max()))
                    break
        return found

    def _linear_peak(self, chosen: np.ndarray, slots: list[int]) -> float:
        return float((self.fixed[slots] + chosen @ self._at(slots)).max())

    def _at(self, slots: list[int]) -> np.ndarray:
        """The effects at some slots, a row for each bundle."""
        if not self.effects:
            return np.zeros((0, len(slots)))
        return np.array([effect.at(slots) for effect in self.effects])

    def _all_effects(self) -> np.ndarray:
        """Live bytes with the first bundle of every block."""
        changes, covered = Changes(), set[str]()
        for bundle in self.bundles:
            paths = {path for option in bundle for path in option.covers}
            if not paths & covered:
                covered |= paths
                changes.extend(self._together(bundle))
        return self.fixed + self.layout.live(changes)

    def _highest(self, live: np.ndarray) -> set[int]:
        spans = zip(self.edges[:-1], self.edges[1:], strict=True)
        return {int(a + live[a:b].argmax()) for a, b in spans if b > a}

    def _fit(self, slots: list[int], budget_bytes: int, *, whole: bool = True) -> np.ndarray | None:
        """Least seconds with the live bytes at ``slots`` within the budget."""
        num, scale = len(self.bundles), max(float(budget_bytes), 1.0)
        room = (budget_bytes - self.fixed[slots]) / scale
        answer = solve(
            self.added_s + 1e-9,
            [at_most(self._at(slots).T / scale, room), self._one_each()],
            is_integer=np.full(num, whole),
            upper=np.ones(num),
            gap=_GAP,
            limit_s=_LIMIT_S,
            constant=self.scheme.seconds,
        )
        return None if answer is None else np.round(answer) if whole else answer

    def _flatten(self, slots: list[int], *, whole: bool = True) -> np.ndarray | None:
        """Least highest live bytes over ``slots``."""
        num, scale = len(self.bundles), max(float(self.fixed.max()), 1.0)
        below = np.hstack((self._at(slots).T / scale, -np.ones((len(slots), 1))))
        answer = solve(
            np.append(self.added_s * 1e-6 / max(float(np.abs(self.added_s).sum()), 1e-12), 1.0),
            [at_most(below, -self.fixed[slots] / scale), self._one_each(1)],
            is_integer=np.append(np.full(num, whole), 0),
            upper=np.append(np.ones(num), np.inf),
            gap=_GAP,
            limit_s=_LIMIT_S,
        )
        return None if answer is None else np.round(answer[:num]) if whole else answer[:num]

    def _one_each(self, num_more: int = 0) -> LinearConstraint:
        """At most one bundle decides about each block; ``num_more`` unknowns follow."""
        num = self.num_rows
        rows = hstack((self.one_of, csr_array((num, num_more)))) if num_more else self.one_of
        return at_most(rows, np.ones(num))

    def _solution(self, chosen: np.ndarray, changes: Changes, peak: int) -> Solution:
        picked = self._picked(chosen)
        seconds = self.scheme.seconds + sum(o.added_s for o in picked)
        return Solution(
            self.scheme, self.layout, picked, changes, peak, seconds, chosen, self.bound_s
        )


def _bundles(layout: Layout, options: list[Option]) -> list[tuple[Option, ...]]:
    """Options alone; in chains of very many blocks, equal ones on the blocks of a unit together."""
    unit_of: dict[str, tuple[str, int]] = {}
    for chain in chains(layout):
        size = unit(len(chain))
        if size > 1:
            for index, path in enumerate(chain):
                unit_of[path] = chain[0], index // size
    found: dict[object, list[Option]] = {}
    for index, option in enumerate(options):
        is_alone = option.paths or option.path not in unit_of
        key = index if is_alone else (unit_of[option.path], option.methods)
        found.setdefault(key, []).append(option)
    return [tuple(bundle) for bundle in found.values()]
