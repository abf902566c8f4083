"""Measures a contender: the peak of one step, the seconds of others, on a CPU or a CUDA device."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from slimgrad.comparing.allocations import allocated_peak, held_bytes
from slimgrad.comparing.runner import Runner
from slimgrad.types import Column


@dataclass(frozen=True)
class Memory:
    """The peak of one step, what saw it, and the ledger's columns where there was a ledger."""

    peak_bytes: int
    peak_from: str
    allocator_bytes: int
    activations_bytes: int | None = None
    temporaries_bytes: int | None = None


def memory_of(runner: Runner, device: torch.device, *, compiled: bool) -> Memory:
    """The peak of a step like all later ones: the optimizer's state is there already.

    On a CPU one step runs under the ledger (none where the step is compiled: no dispatch mode sees into it) and
    one under the profiler; on CUDA the allocator's own peak is taken, less what others hold on the device.
    """
    if device.type == "cuda":
        peak = _cuda_peak(runner, device)
        return Memory(peak, "cuda", peak)
    if compiled:
        before = held_bytes(runner.model, runner.optimizer, runner.batch)
        allocator = allocated_peak(runner.step, before)
        return Memory(allocator, "allocator", allocator)
    with runner.ledger() as ledger:
        runner.step()
    allocator = allocated_peak(runner.step, int(ledger.timeline.total[0]))
    columns = ledger.columns
    return Memory(
        ledger.peak_bytes,
        "ledger",
        allocator,
        columns[Column.ACTIVATIONS],
        columns[Column.TEMPORARIES],
    )


def _cuda_peak(runner: Runner, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - runner.foreign_bytes


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """How long ``run`` takes: by CUDA's events where it computes there, else by the clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    started.record()
    run()
    ended.record()
    torch.cuda.synchronize(device)
    return started.elapsed_time(ended) / 1e3


@contextmanager
def limited(seconds: float | None) -> Generator[None]:
    """Raise ``TimeoutError`` within the body after ``seconds`` (never: None, or outside the main thread)."""
    on_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not on_main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    # again and again: an exception raised within a callback of the garbage collector is lost
    signal.setitimer(signal.ITIMER_REAL, seconds, min(1.0, max(seconds, 0.05)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
