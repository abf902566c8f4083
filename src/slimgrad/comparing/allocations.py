"""The peak of a stretch of code from the profiler's allocation events.

They see what compiled code and kernels allocate, which no dispatch mode does; they know nothing of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile
from torch.optim import Optimizer

from slimgrad.batches import named_tensors
from slimgrad.measuring.tracker import plain_tensors


def held_bytes(model: nn.Module, optimizer: Optimizer | None, batch: Any) -> int:
    """Bytes of the storages of weights, buffers, gradients, optimizer state and batch, each counted once."""
    held: list[Any] = [*model.parameters(), *model.buffers()]
    held += [p.grad for p in model.parameters()]
    if optimizer is not None:
        held += [dict(state) for state in optimizer.state.values()]
    held += named_tensors(batch).values()
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in plain_tensors(held)}
    return sum(storage.nbytes() for storage in storages.values())


def allocated_peak(run: Callable[[], object], before_bytes: int = 0) -> int:
    """The most bytes allocated on the CPU at any instant of ``run``, ``before_bytes`` of them from the start.

    What was allocated before counts to the end: the profiler does not tell when such memory is freed.
    """
    profiler: Any = profile(profile_memory=True)
    with profiler:
        run()
    now = peak = before_bytes
    for _, size in sorted(
        _allocations(profiler.kineto_results.experimental_event_tree()), key=lambda e: e[0]
    ):
        now += size
        peak = max(peak, now)
    return peak


def _allocations(roots: Iterable[Any]) -> Iterable[tuple[int, int]]:
    """When, and by how many bytes (negative: freed), for every event of the trees."""
    pending = list(roots)
    allocation = _EventType.Allocation
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == allocation and event.typed[1].device.type == "cpu":
            yield event.start_time_ns, event.typed[1].alloc_size
