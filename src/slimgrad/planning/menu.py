"""The options for a traced step's blocks as matrices: what each changes, and which blocks it decides about.

They are the same for every scheme of one traced variant, so they are made once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from slimgrad.method import Restore
from slimgrad.planning.calls import Changes
from slimgrad.planning.offers import Option
from slimgrad.planning.runs import chains, unit
from slimgrad.planning.simulate import Layout


class Effect:
    """What one choice changes in the live bytes, at any slots."""

    def __init__(self, changes: Changes) -> None:
        slot, nbytes, _ = changes.rows.T
        order = np.argsort(slot, kind="stable")
        self.slot = slot[order]
        self.sums = np.concatenate(([0.0], np.cumsum(nbytes[order], dtype=np.float64)))

    def at(self, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """Bytes above what is live without the choice, one entry a slot."""
        return self.sums[np.searchsorted(self.slot, slots, side="right")]


class Menu:
    """The options on a layout, in *bundles*: one option each, or in a chain of very many blocks one on each of several.

    ``one_of`` has a row for each block, or blocks that the same bundles decide about, with ones where a bundle does.
    """

    def __init__(self, layout: Layout, options: Sequence[Option]) -> None:
        self.layout, self.options = layout, list(options)
        self.bundles = _bundles(layout, self.options)
        self._held = {
            id(option): layout.held(option.where, option.record) for option in self.options
        }
        self._blocks = {
            id(option): layout.block_changes(option.where, option.record) for option in self.options
        }
        self.effects = [Effect(self._together(bundle)) for bundle in self.bundles]
        self.squared_errors = np.array(
            [sum(o.record.squared_error for o in bundle) for bundle in self.bundles]
        )
        self.coding_s = np.array([sum(o.coding_s for o in bundle) for bundle in self.bundles])
        self.added_s = np.array([sum(o.added_s for o in bundle) for bundle in self.bundles])
        self.covers = [frozenset(p for o in bundle for p in o.covers) for bundle in self.bundles]
        self.one_of, self.num_rows = self._covered()

    @cached_property
    def most_saved_s(self) -> float:
        """What the options that are faster than plain blocks save at most."""
        added, (rows, bundles) = np.zeros(self.num_rows), self.one_of.nonzero()
        np.minimum.at(added, rows, self.added_s[bundles])
        return -float(added.sum())

    @cached_property
    def of_the_first(self) -> np.ndarray:
        """What the first bundle of every block changes in the live bytes, one entry a slot."""
        changes, covered = Changes(), set[str]()
        for bundle, paths in zip(self.bundles, self.covers, strict=True):
            if not paths & covered:
                covered |= paths
                changes.extend(self._together(bundle))
        return self.layout.live(changes)

    def at(self, slots: Sequence[int]) -> np.ndarray:
        """The effects at some slots, a row for each bundle."""
        wanted = np.asarray(slots, dtype=np.int64)
        if not self.effects:
            return np.zeros((0, len(wanted)))
        return np.array([effect.at(wanted) for effect in self.effects])

    def _together(self, bundle: tuple[Option, ...]) -> Changes:
        changes = Changes()
        for option in bundle:
            changes.extend(self._blocks[id(option)])
            changes.extend(self.layout.hold_changes(self._held[id(option)]))
        return changes

    def changes(self, chosen: np.ndarray) -> Changes:
        """What the chosen bundles change together, border tensors counted once."""
        picked = self.picked(chosen)
        changes, held = Changes(), dict[int, int]()
        offloaded = [
            call
            for option in picked
            if option.record.restore is Restore.COPY
            for call in self.layout.block(option.where).calls
            if call in self.layout.window
        ]
        for option in picked:
            if option.record.restore is Restore.COPY:
                made = self.layout.block_changes(option.where, option.record, offloaded)
            else:
                made = self._blocks[id(option)]
            changes.extend(made)
            for storage, stop in self._held[id(option)].items():
                held[storage] = max(held.get(storage, 0), stop)
        changes.extend(self.layout.hold_changes(held))
        return changes

    def picked(self, chosen: np.ndarray) -> tuple[Option, ...]:
        """The options of the chosen bundles."""
        return tuple(option for index in np.flatnonzero(chosen) for option in self.bundles[index])

    def _covered(self) -> tuple[csr_array, int]:
        deciding: dict[str, list[int]] = {}
        for index, paths in enumerate(self.covers):
            for path in paths:
                deciding.setdefault(path, []).append(index)
        rows = sorted({tuple(columns) for columns in deciding.values()})
        entries = [(i, column) for i, columns in enumerate(rows) for column in columns]
        where = np.array(entries, dtype=int).reshape(-1, 2).T
        shape = (len(rows), len(self.bundles))
        return csr_array((np.ones(len(entries)), where), shape=shape), len(rows)


def _bundles(layout: Layout, options: Sequence[Option]) -> list[tuple[Option, ...]]:
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
