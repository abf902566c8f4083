"""The operations of a block, or of several in a row, and what of theirs backward needs."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable
from dataclasses import dataclass

import numpy as np

from slimgrad.code import Use


@dataclass(frozen=True)
class OperationGraph:
    """The operations of a block's forward pass and the storages that it makes, by their number.

    ``num_bytes`` and ``is_saved`` (does backward ask for it?) have one entry a storage; ``operations`` are
    (seconds, storages read, storages written), what comes from outside the block left out. Of several blocks in a
    row, ``stages`` tells for each operation which one it belongs to. ``uses`` says of each saved storage what backward
    does with it (None: not known, or not saved).
    """

    num_bytes: tuple[int, ...]
    is_saved: tuple[bool, ...]
    operations: tuple[tuple[float, tuple[int, ...], tuple[int, ...]], ...]
    stages: tuple[int, ...] = ()
    uses: tuple[Use | None, ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.num_bytes, self.is_saved, self.operations, self.stages))

    @functools.cached_property
    def untimed(self) -> OperationGraph:
        """The same graph without seconds: equal for blocks that do the same at another pace."""
        operations = tuple((0.0, reads, writes) for _, reads, writes in self.operations)
        return OperationGraph(self.num_bytes, self.is_saved, operations, self.stages)

    @functools.cached_property
    def seconds(self) -> np.ndarray:
        """Of each operation."""
        return np.array([seconds for seconds, _, _ in self.operations], dtype=float)

    @property
    def num_stages(self) -> int:
        """Over how many blocks the graph goes."""
        return max(self.stages, default=0) + 1

    def stage_of(self, operation: int) -> int:
        """Which of the blocks in a row an operation belongs to."""
        return self.stages[operation] if self.stages else 0

    @functools.cached_property
    def saved(self) -> tuple[int, ...]:
        """The storages that backward asks for, by number."""
        return tuple(s for s, is_saved in enumerate(self.is_saved) if is_saved)

    def does_the_same_as(self, other: OperationGraph) -> bool:
        """Whether storages of one number are the same in both, whatever their bytes and the operations' seconds."""
        ours, theirs = (
            (
                graph.is_saved,
                graph.stages,
                [(reads, writes) for _, reads, writes in graph.operations],
                [use and (use.dtype, use.readers) for use in graph.uses],
            )
            for graph in (self, other)
        )
        return ours == theirs

    def recipe(self, wanted: Iterable[int], kept: Container[int]) -> list[int]:
        """The operations that make the storages ``wanted`` from those in ``kept``, in their order."""
        found, open_storages, met = set[int](), list(wanted), set[int]()
        while open_storages:
            storage = open_storages.pop()
            if storage in met or storage in kept:
                continue
            met.add(storage)
            for index in self.writers[storage]:
                if index not in found:
                    found.add(index)
                    open_storages += self.operations[index][1]
        return sorted(found)

    @functools.cached_property
    def writers(self) -> tuple[tuple[int, ...], ...]:
        """For each storage, the operations that write it."""
        by_storage: list[list[int]] = [[] for _ in self.num_bytes]
        for index, (_, _, writes) in enumerate(self.operations):
            for storage in dict.fromkeys(writes):
                by_storage[storage].append(index)
        return tuple(map(tuple, by_storage))
