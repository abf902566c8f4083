"""Runs the reconstruction of the block before on a second thread, while a block is differentiated."""

from __future__ import annotations

from collections.abc import Iterable
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
    """A job, and its pieces: made already, or made as they are asked for."""

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


class _Overlapped(Ahead):
    """One block ahead, on one worker. Under a dispatch mode (a ledger) the same is done on the caller's thread, which it watches."""

    def __init__(self) -> None:
        self._last: Any = None
        self._ready: tuple[Any, Future[list[Piece]]] | None = None

    def passed(self, link: Any) -> None:
        link.before, self._last = self._last, link

    def taken(self, job: Any) -> Taken:
        ready, self._ready = self._ready, None
        if ready is not None and ready[0].link is job.link:
            job, pieces = ready[0], ready[1].result()
        else:
            pieces = list(job.pieces())
        before = job.before()
        if before is not None:
            self._ready = before, _start(before)
        return Taken(job, _handed_out(pieces))

    def clear(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None:
            ready[1].cancel()


def _handed_out(pieces: list[Piece]) -> Iterable[Piece]:
    pieces.reverse()
    while pieces:
        yield pieces.pop()


def _start(job: Job) -> Future[list[Piece]]:
    if _get_current_dispatch_mode_stack():
        done = Future[list[Piece]]()
        done.set_result(list(job.pieces()))
        return done
    return _worker().submit(lambda: list(job.pieces()))


_WORKERS: list[ThreadPoolExecutor] = []


def _worker() -> ThreadPoolExecutor:
    if not _WORKERS:
        _WORKERS.append(ThreadPoolExecutor(1, "reversible"))
    return _WORKERS[0]
