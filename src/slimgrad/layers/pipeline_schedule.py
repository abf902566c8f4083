"""What a pipeline's stages do when, from the seconds of a micro-batch's forward, input gradient and weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimgrad.errors import ArgumentError

SCHEDULES = ("gpipe", "1f1b")


@dataclass(frozen=True)
class Task:
    """One piece of work: ``kind`` is F, B (both gradients), I (of the input) or W (of the weight)."""

    kind: str
    stage: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Every task of one step. ``most_pending`` is how many micro-batches' weight gradients a stage owes at most."""

    tasks: tuple[Task, ...]
    num_stages: int
    most_pending: int

    @property
    def seconds(self) -> float:
        """From the first task's start to the last one's end."""
        return max(t.end_s for t in self.tasks)

    @property
    def idle_s(self) -> float:
        """Seconds in which a stage does nothing, summed over the stages."""
        return self.num_stages * self.seconds - sum(t.end_s - t.start_s for t in self.tasks)

    @property
    def idle_ratio(self) -> float:
        """The share of all stages' time that is idle."""
        return self.idle_s / (self.num_stages * self.seconds)


def orders(schedule: str, num_stages: int, num_micro_batches: int) -> list[list[tuple[str, int]]]:
    """For each stage its forwards and backwards, (kind, micro-batch), in the order in which they run."""
    if schedule not in SCHEDULES:
        raise ArgumentError(f"expected a schedule of {', '.join(SCHEDULES)}, got {schedule!r}")
    every = range(num_micro_batches)
    if schedule == "gpipe":
        one = [("F", i) for i in every] + [("B", i) for i in reversed(every)]
        return [list(one) for _ in range(num_stages)]
    found: list[list[tuple[str, int]]] = []
    for stage in range(num_stages):
        ahead = min(num_micro_batches, num_stages - stage - 1)
        order = [("F", i) for i in range(ahead)]
        for i in range(ahead, num_micro_batches):
            order += [("F", i), ("B", i - ahead)]
        found.append(
            order + [("B", i) for i in range(num_micro_batches - ahead, num_micro_batches)]
        )
    return found


def simulate(
    schedule: str,
    num_micro_batches: int,
    forward_s: Sequence[float],
    input_gradient_s: Sequence[float],
    weight_gradient_s: Sequence[float],
    *,
    two_stage: bool,
    transfer_s: float = 0.0,
) -> Timeline:
    """Run a schedule with one stage an entry of the seconds; ``transfer_s`` passes between neighbours.

    With ``two_stage`` a neighbour gets its gradient after the input gradient alone; weight gradients run where they
    fit before the stage's next task can start, and what is left of them at the end.
    """
    num_stages = len(forward_s)
    if not num_stages == len(input_gradient_s) == len(weight_gradient_s) or num_micro_batches < 1:
        raise ArgumentError(
            "expected seconds for the same number of stages and at least one micro-batch"
        )
    backward_s = [
        i if two_stage else i + w for i, w in zip(input_gradient_s, weight_gradient_s, strict=True)
    ]
    left = orders(schedule, num_stages, num_micro_batches)
    ends: dict[tuple[str, int, int], float] = {}
    stages = [_Stage(s, weight_gradient_s[s]) for s in range(num_stages)]
    while any(left):
        for stage, order in zip(stages, left, strict=True):
            while order:
                kind, index = order[0]
                needed = _needed(kind, stage.number, index, num_stages)
                if any(n not in ends for n in needed):
                    break
                ready = max(
                    (ends[n] + (n[1] != stage.number) * transfer_s for n in needed), default=0.0
                )
                seconds = forward_s[stage.number] if kind == "F" else backward_s[stage.number]
                name = "I" if two_stage and kind == "B" else kind
                ends[kind, stage.number, index] = stage.run(name, index, ready, seconds)
                del order[0]
    for stage in stages:
        stage.fill(float("inf"))
    tasks = tuple(t for stage in stages for t in stage.tasks)
    return Timeline(tasks, num_stages, max(stage.most_pending for stage in stages))


def _needed(kind: str, stage: int, index: int, num_stages: int) -> list[tuple[str, int, int]]:
    if kind == "F":
        return [("F", stage - 1, index)] if stage else []
    after = [("B", stage + 1, index)] if stage + 1 < num_stages else []
    return [("F", stage, index), *after]


class _Stage:
    def __init__(self, number: int, weight_gradient_s: float) -> None:
        self.number, self.weight_gradient_s = number, weight_gradient_s
        self.tasks: list[Task] = []
        self.pending: list[int] = []
        self.free_s, self.most_pending = 0.0, 0

    def run(self, kind: str, index: int, ready_s: float, seconds: float) -> float:
        self.fill(ready_s)
        start = max(self.free_s, ready_s)
        self._add(kind, index, start, seconds)
        if kind == "I":
            self.pending.append(index)
            self.most_pending = max(self.most_pending, len(self.pending))
        return self.free_s

    def fill(self, until_s: float) -> None:
        while self.pending and self.free_s + self.weight_gradient_s <= until_s:
            self._add("W", self.pending.pop(0), self.free_s, self.weight_gradient_s)

    def _add(self, kind: str, index: int, start: float, seconds: float) -> None:
        self.free_s = start + seconds
        self.tasks.append(Task(kind, self.number, index, start, self.free_s))
