"""What stands in a plan file: keys that are missing, misspelt or not known are told in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from slimgrad.catalogue import did_you_mean
from slimgrad.errors import PlanError

_BESIDE = ("format",)  # of the file itself
_NOT_SAVED = ("timeline",)


def check_plan_keys(data: Any, plan: type[Any], choice: type[Any]) -> None:
    """Raise ``PlanError`` where ``data`` has a key that ``plan`` and its choices do not know, or lacks one."""
    if not isinstance(data, Mapping):
        raise PlanError(f"expected an object with the plan's keys, found {type(data).__name__}")
    _check(data, plan, "the plan")
    choices = data["choices"]
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise PlanError(f"'choices' must be a list, found {type(choices).__name__}")
    for number, each in enumerate(choices, 1):
        if not isinstance(each, Mapping):
            raise PlanError(f"choice {number} must be an object, found {type(each).__name__}")
        _check(each, choice, f"choice {number}", beside=())


def _check(
    data: Mapping[str, Any], cls: type[Any], where: str, *, beside: Sequence[str] = _BESIDE
) -> None:
    known = [*beside, *(f.name for f in fields(cls) if f.name not in _NOT_SAVED)]
    for key in data:
        if key not in known:
            raise PlanError(f"{where} has an unknown key {key!r}; {did_you_mean(str(key), known)}")
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    for key in (*beside, *needed):
        if key not in data:
            raise PlanError(f"{where} lacks the key {key!r}")
