"""Where a step's tensors would lie in one arena: how much an allocator may waste, and how little is possible."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from slimgrad.applying.step import Step
from slimgrad.arena import Lifetimes, layouts
from slimgrad.measuring.blocks import cut
from slimgrad.measuring.ledger import Ledger
from slimgrad.types import format_bytes
from slimgrad.verifying.trial import tried


@dataclass(frozen=True)
class StepLayout:
    """Bytes of the arenas that hold all that is born in a step, by rule, beside the most that is live at once."""

    num_tensors: int
    live_bytes: int
    total_bytes: int
    arenas: dict[str, int]

    @property
    def fragmentation(self) -> dict[str, float]:
        """By rule, how far the arena is above the live bytes: 0.05 is 5 % more."""
        least = max(self.live_bytes, 1)
        return {rule: nbytes / least - 1 for rule, nbytes in self.arenas.items()}

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"fragmentation": self.fragmentation}

    def __str__(self) -> str:
        lines = [
            f"Layout: {self.num_tensors} tensors are born in a step, {format_bytes(self.total_bytes)} in all; "
            f"{format_bytes(self.live_bytes)} are live at once"
        ]
        for rule, nbytes in self.arenas.items():
            above = self.fragmentation[rule]
            lines.append(f"  {rule:<18} {format_bytes(nbytes):>10}  {above:6.1%} fragmentation")
        return "\n".join(lines)


def lay_out(step: Step, batch: Any) -> StepLayout:
    """Run steps on ``batch``, put everything back, and lay out the tensors of the last, by every rule.

    ``first fit`` is what an allocator does that places each tensor when it comes; the others know all lifetimes.
    """
    borders: list[int] = []

    @contextmanager
    def watching(ledger: Ledger) -> Generator[None]:
        handles = [_noting(m, ledger, borders) for m in _blocks(step.host.model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    ledger = tried(step, batch, watching)
    return layout_of(ledger.lifetimes, sorted(set(borders)))


def layout_of(lifetimes: Lifetimes, borders: list[int]) -> StepLayout:
    """The layouts of lifetimes whose stretches begin at ``borders``."""
    aligned = lifetimes.aligned()
    arenas = {arena.rule: arena.nbytes for arena in layouts(aligned, borders)}
    return StepLayout(len(aligned), aligned.bound, aligned.total_bytes, arenas)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(path) for path in cut(model)]


def _noting(module: nn.Module, ledger: Ledger, borders: list[int]) -> Any:
    """Notes when a block begins, in forward and where it is run again."""
    return module.register_forward_pre_hook(lambda *_: borders.append(ledger.num_operations + 1))
