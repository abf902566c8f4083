"""Runs the reconstruction of the function before on a second thread, while a function is differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # pyright: ignore[reportUnknownVariableType]

from slimgrad.layers.coupling import Piece


class Job(Protocol):
    """The reconstruction of one block."""

    link: Any
    held: Any
    extras: Any

    def pieces(self) -> Iterable[Piece]:
        """Run it, function by function."""
        ...

    def before(self) -> Job | None:
        """The block before, where this one is done."""
        ...


@dataclass
class Taken:
    """A job, and its pieces, made as they are asked for or one ahead."""

    job: Any
    pieces: Iterable[Piece]


class Ahead:
    """In order: each block is reconstructed when it is its turn."""

    @staticmethod
    def of(overlap: bool) -> Ahead:
        """For a chain with or without ``overlap``."""
        return _Overlapped() if overlap else Ahead()

    def passed(self, link: Any) -> None:
        """The forward pass went through ``link``."""

    def taken(self, job: Any) -> Taken:
        """The pieces of ``job``."""
        return Taken(job, job.pieces())

    def clear(self) -> None:
        """Forget what was run ahead."""


@dataclass
class _Run:
    """A job that is under way: its pieces so far are made."""

    job: Job
    pieces: Iterator[Piece]

    @staticmethod
    def of(job: Job) -> _Run:
        return _Run(job, iter(job.pieces()))

    def step(self) -> tuple[_Run, Piece] | None:
        """The next piece, of the block before where this one is done; None where there is no such block."""
        run: _Run = self
        while True:
            piece = next(run.pieces, None)
            if piece is not None:
                return run, piece
            before = run.job.before()
            if before is None:
                return None
            run = _Run.of(before)


class _Overlapped(Ahead):
    """One function ahead, on one worker. Under a dispatch mode (a ledger) the same is done on the caller's thread, which it watches."""

    def __init__(self) -> None:
        self._last: Any = None
        self._ready: Future[tuple[_Run, Piece] | None] | None = None

    def passed(self, link: Any) -> None:
        link.before, self._last = self._last, link

    def taken(self, job: Job) -> Taken:
        ready, self._ready = self._ready, None
        made = None if ready is None else ready.result()
        if made is None or made[0].job.link is not job.link:
            made = _Run.of(job).step()
        assert made is not None  # a block has a function for each stream
        run, piece = made
        return Taken(run.job, self._handed_out(run, [piece]))

    def _handed_out(self, run: _Run, pieces: list[Piece]) -> Iterator[Piece]:
        """The rest of ``run``'s pieces; none is held here while it is differentiated."""
        while pieces:
            self._ready = _start(run)
            yield pieces.pop()
            made = self._ready.result()
            if made is not None and made[0] is run:
                pieces.append(made[1])
            del made  # the first piece of another block waits in self._ready

    def clear(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.cancel()


def _start(run: _Run) -> Future[tuple[_Run, Piece] | None]:
    if _get_current_dispatch_mode_stack():
        done = Future[tuple[_Run, Piece] | None]()
        done.set_result(run.step())
        return done
    return _worker().submit(run.step)


_WORKERS: list[ThreadPoolExecutor] = []


def _worker() -> ThreadPoolExecutor:
    if not _WORKERS:
        _WORKERS.append(ThreadPoolExecutor(1, "reversible"))
    return _WORKERS[0]
