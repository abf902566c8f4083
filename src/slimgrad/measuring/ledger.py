"""The ledger: live bytes by column and module, whoever holds them, deterministic from run to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.arena import Lifetimes
from slimgrad.errors import SlimgradError
from slimgrad.measuring.compiled_code import visible_buffers
from slimgrad.measuring.tracker import Tracker
from slimgrad.types import Column


@dataclass(frozen=True)
class MemoryTimeline:
    """Live bytes of each column after each operation, and names for some of the instants."""

    columns: Mapping[Column, np.ndarray]
    marks: tuple[tuple[int, str], ...] = ()

    @property
    def total(self) -> np.ndarray:
        """Live bytes over all columns, one entry an operation."""
        return np.sum(np.stack(list(self.columns.values())), axis=0)

    @property
    def peak_bytes(self) -> int:
        """The highest instant."""
        return int(self.total.max(initial=0))

    def at_peak(self) -> dict[Column, int]:
        """Bytes of each column at the highest instant; they sum to ``peak_bytes``."""
        if self.total.size == 0:
            return dict.fromkeys(Column, 0)
        instant = int(self.total.argmax())
        return {column: int(live[instant]) for column, live in self.columns.items()}


def timeline_of(
    nbytes: np.ndarray,
    birth: np.ndarray,
    death: np.ndarray,
    column: np.ndarray,
    num_ticks: int,
    marks: Iterable[tuple[int, str]] = (),
) -> MemoryTimeline:
    """Replay storage lifetimes: ``column`` holds positions in ``Column``; ``death`` past the end means alive."""
    live: dict[Column, np.ndarray] = {}
    for position, name in enumerate(Column):
        mine = column == position
        change = np.zeros(num_ticks + 2, dtype=np.int64)
        np.add.at(change, np.minimum(birth[mine], num_ticks + 1), nbytes[mine])
        np.add.at(change, np.minimum(death[mine], num_ticks + 1), -nbytes[mine])
        live[name] = np.cumsum(change)[: num_ticks + 1]
    return MemoryTimeline(live, tuple(marks))


class InsideCompiled(Tracker):
    """A tracker that compiled code runs under, instead of giving way to the plain code that it was made from."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiling itself is not watched; what was compiled is."""
        return True

    def __enter__(self) -> InsideCompiled:
        self._buffers = visible_buffers()
        self._buffers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._buffers.__exit__(None, None, None)


class Ledger:
    """Counts the bytes of live tensors on a device while it is entered, those inside compiled code too.

    >>> import torch
    >>> with Ledger() as ledger:
    ...     x = torch.zeros(1024)
    >>> ledger.peak_bytes
    4096

    ``model`` and ``optimizer`` give the columns their names; ``inputs`` is the batch. Tensors that were there
    before, and that nobody named, are counted from the start once an operation uses them. Not re-entrant.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        inputs: Any = None,
        owned: Iterable[tuple[Column, Tensor]] = (),
        device: torch.device | None = None,
    ) -> None:
        self._tracker = InsideCompiled(model, optimizer, inputs=inputs, owned=owned, device=device)
        self._entered = False
        self._timeline: MemoryTimeline | None = None

    def __enter__(self) -> Ledger:
        if self._entered:
            raise SlimgradError("a Ledger counts one stretch of code: make a new one for the next")
        self._entered = True
        self._tracker.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._tracker.__exit__(*exc)
        self._timeline = self._replay()

    @property
    def peak_bytes(self) -> int:
        """The most bytes live at any instant so far."""
        return self._timeline.peak_bytes if self._timeline else self._tracker.peak_bytes

    @property
    def now_bytes(self) -> int:
        """The bytes live now."""
        return self._tracker.live_bytes

    @property
    def timeline(self) -> MemoryTimeline:
        """Live bytes by column after each operation."""
        return self._timeline or self._replay()

    @property
    def columns(self) -> dict[Column, int]:
        """The most bytes that each column held at any instant; they need not be at the same instant."""
        return {c: int(live.max(initial=0)) for c, live in self.timeline.columns.items()}

    @property
    def num_operations(self) -> int:
        """How many operations ran so far: the instant that it is."""
        return self._tracker.tick

    @property
    def lifetimes(self) -> Lifetimes:
        """Of each storage that was born while the ledger was entered: its bytes, and first and past-the-end instants."""
        tracker, end = self._tracker, self._tracker.tick + 1
        rows = zip(tracker.nbytes, tracker.birth, tracker.death, strict=True)
        born = [(n, b, max(d if d >= 0 else end, b + 1)) for n, b, d in rows if b > 0 and n > 0]
        return Lifetimes(*np.array(born, dtype=np.int64).reshape(-1, 3).T)

    @property
    def modules(self) -> dict[str, int]:
        """Activation bytes by the module whose forward pass made them (innermost module)."""
        tracker = self._tracker
        held: dict[str, int] = {}
        for nbytes, column, module in zip(
            tracker.nbytes, tracker.column, tracker.module, strict=True
        ):
            if column is Column.ACTIVATIONS:
                path = tracker.module_paths[module] if module >= 0 else ""
                held[path] = held.get(path, 0) + nbytes
        return held

    def _replay(self) -> MemoryTimeline:
        tracker = self._tracker
        num_ticks = tracker.tick
        order = {column: position for position, column in enumerate(Column)}
        death = np.array([d if d >= 0 else num_ticks + 1 for d in tracker.death], dtype=np.int64)
        column = np.array([order[c or Column.TEMPORARIES] for c in tracker.column], dtype=np.int64)
        marks = [(t, "backward begins") for t in tracker.in_backward_from]
        marks += [(t, "optimizer") for t in tracker.optimizer_from]
        return timeline_of(
            np.array(tracker.nbytes, dtype=np.int64),
            np.array(tracker.birth, dtype=np.int64),
            death,
            column,
            num_ticks,
            sorted(marks),
        )
