"""What a plan has attached to the user's objects, choice by choice: it can be exchanged between two steps."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from slimgrad import catalogue
from slimgrad.applying.gradient_hooks import watch_gradients
from slimgrad.host import Host
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.method import Block, Scope, Undo
from slimgrad.planning.plan import Choice


class Attachment:
    """A plan's choices, attached in their order, those for the whole step before those for blocks.

    If one cannot be attached, those before it are undone.
    """

    def __init__(self, choices: Sequence[Choice], host: Host) -> None:
        self.host = host
        self.choices = _in_order(choices)
        self._attached: list[tuple[Choice, Undo]] = []
        self._ground = Undo()
        self.attach()

    def attach(self) -> None:
        """Attach everything, after ``undo``."""
        try:
            self._ground.then(switch_off_cache(self.host.model))
            self._ground.then(watch_gradients(self.host))
            self._add(self.choices)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put everything back, what was attached last first."""
        self._take_off(0)
        self._ground()

    def change_to(self, choices: Sequence[Choice]) -> None:
        """Undo what is attached from the first choice that differs on, and attach ``choices`` from there.

        Optimizer state kept outside the device comes back to it only where that choice, or one before it,
        differs. If one cannot be attached, the old ones are attached again and the error is raised.
        """
        wanted, before = _in_order(choices), self.choices
        same = 0
        while same < min(len(wanted), len(before)) and _alike(wanted[same], before[same]):
            same += 1
        self._take_off(same)
        try:
            self._add(wanted[same:])
            self.choices = wanted
        except BaseException:
            self._take_off(same)
            self._add(before[same:])
            raise

    @contextmanager
    def without_blocks(self) -> Generator[None]:
        """Nothing attached to blocks within the body; what is attached to the whole step stays."""
        whole = sum(1 for choice in self.choices if not choice.path)
        self._take_off(whole)
        try:
            yield
        finally:
            self._add(self.choices[whole:])

    def _add(self, choices: Sequence[Choice]) -> None:
        for choice in choices:
            method = catalogue.get(choice.method, **choice.fields)
            scope = Scope.BLOCK if choice.path else Scope.MODEL
            undo = method.attach(Block(choice.path, scope, host=self.host))
            self._attached.append((choice, undo))

    def _take_off(self, first: int) -> None:
        while len(self._attached) > first:
            self._attached.pop()[1]()


def _in_order(choices: Sequence[Choice]) -> list[Choice]:
    return sorted(choices, key=lambda choice: bool(choice.path))


def _alike(one: Choice, other: Choice) -> bool:
    return (one.path, one.method, dict(one.fields)) == (
        other.path,
        other.method,
        dict(other.fields),
    )
