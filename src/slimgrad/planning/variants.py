"""The step as plans run it: traced as it is, with each setting of each rewriting method, and with several together."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slimgrad import catalogue
from slimgrad.errors import LossError, SlimgradError
from slimgrad.host import Host
from slimgrad.measuring.clock import OpKey
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.model_cache import has_cache, switch_off_cache
from slimgrad.measuring.profile import Setting
from slimgrad.measuring.trace import Trace, trace_step
from slimgrad.method import Method, Refusal, Rewriting, method_name
from slimgrad.planning.real_passes import attached, setting_of
from slimgrad.types import format_bytes

_LEAST_BYTES, _LEAST_OPERATIONS = 0.01, 0.05  # of the plain peak, of its operations

Combination = tuple[Method, ...]


def traced(
    host: Host, batch: Any, paths: list[str], keys: dict[OpKey, int], *, fake_only: bool = False
) -> Trace:
    """The step's passes on fake tensors; unless ``fake_only``, on real ones where the loss fails on those.

    Raises ``LossError`` where it fails on both.
    """
    shares = list(host.split(batch))[:3]  # the first, one like all later ones, and the last
    try:
        return trace_step(host.model, host.loss_fn, shares, paths, keys)
    except SlimgradError:
        raise
    except Exception as fake_error:
        if fake_only:
            raise
        if any(is_fake(p) for p in host.model.parameters()):
            raise LossError(
                f"one forward and backward pass of loss_fn failed on fake tensors: {fake_error!r}"
            ) from fake_error
        try:
            return trace_step(host.model, host.loss_fn, shares, paths, keys, fake=False)
        except SlimgradError:
            raise
        except Exception as error:
            raise LossError(
                f"one forward and backward pass of loss_fn failed: {error!r} (on fake tensors: {fake_error!r})"
            ) from error


def variants(
    host: Host,
    batch: Any,
    plain: Trace,
    paths: list[str],
    keys: dict[OpKey, int],
    refusals: dict[str, str],
) -> dict[tuple[Setting, ...], Trace]:
    """The step with nothing attached, with each setting of a rewriting method, and with combinations of those.

    ``plain`` is the step as the user runs it. Settings that do away with next to nothing are not combined: what they
    change, they change alone. Why a method has no trace is added to ``refusals``.
    """
    cached = has_cache(host.model)
    undo = switch_off_cache(host.model)
    try:
        bare = traced(host, batch, paths, keys) if cached else plain
        if bare.timeline().peak_bytes > plain.timeline().peak_bytes:
            undo()  # without the cache Transformers masks fake tokens, whose values it cannot see
            bare = plain
        found: dict[Combination, Trace] = {(): bare}
        joined: list[Combination] = [()]  # those that settings of further methods are combined with
        for name, cls in catalogue.methods().items():
            if not isinstance(cls, Rewriting) or getattr(cls, "compiles", False):
                continue
            with attached(host, max(joined, key=len)):
                settings = cls.settings(host, batch)
            if isinstance(settings, Refusal):
                refusals[name] = settings.reason
                continue
            attempt = functools.partial(_attempt, host, batch, paths, keys, refusals)
            if getattr(cls, "is_refinement", False):
                _refine(name, found, settings, attempt, refusals)
            else:
                _add(found, joined, settings, attempt)
            if any(isinstance(m, cls) for methods in found for m in methods):
                refusals.pop(name, None)  # another of its settings can be used
        return {tuple(map(setting_of, methods)): trace for methods, trace in found.items()}
    finally:
        undo()


def _add(
    found: dict[Combination, Trace],
    joined: list[Combination],
    settings: Sequence[Method],
    attempt: Callable[[Combination], Trace | None],
) -> None:
    """Trace each of a method's settings alone and, where that changes much, with each combination so far."""
    for combination in list(joined):
        for setting in settings:
            if combination and (setting,) not in joined:
                continue
            trace = attempt((*combination, setting))
            if trace is None:
                continue
            found[*combination, setting] = trace
            if combination or _changes_much(found[()], trace):
                joined.append((*combination, setting))


def _refine(
    name: str,
    found: dict[Combination, Trace],
    settings: Sequence[Method],
    attempt: Callable[[Combination], Trace | None],
    refusals: dict[str, str],
) -> None:
    """Trace each setting alone, for where the step keeps less with it: elsewhere it costs nothing in planning."""
    bare = found[()]
    for setting in settings:
        trace = attempt((setting,))
        if trace is not None and _keeps_less(bare, trace):
            found[setting,] = trace
        elif trace is not None:
            least = format_bytes(_LEAST_BYTES * bare.timeline().peak_bytes)
            refusals[name] = f"what the step keeps for backward would fall by less than {least}"


def _attempt(
    host: Host,
    batch: Any,
    paths: list[str],
    keys: dict[OpKey, int],
    refusals: dict[str, str],
    methods: Combination,
) -> Trace | None:
    with attached(host, methods):
        try:
            return traced(host, batch, paths, keys, fake_only=True)
        except Exception as error:
            refusals[method_name(methods[-1])] = f"cannot be traced on fake tensors: {error!r}"
            return None


def _changes_much(bare: Trace, trace: Trace) -> bool:
    """Could the rewriting free a hundredth of the peak at any budget, or is a twentieth of the operations others?"""
    freed = Counter(bare.nbytes.tolist()) - Counter(trace.nbytes.tolist())
    if sum(size * num for size, num in freed.items()) >= _LEAST_BYTES * bare.timeline().peak_bytes:
        return True
    num = 1 + max(int(bare.op.max(initial=0)), int(trace.op.max(initial=0)))
    gone = np.bincount(bare.op, minlength=num) - np.bincount(trace.op, minlength=num)
    return int(gone.clip(min=0).sum()) >= _LEAST_OPERATIONS * bare.num_ticks


def _keeps_less(bare: Trace, trace: Trace) -> bool:
    """Is less live where backward begins, by a hundredth of the peak?"""
    freed = _held_bytes(bare) - _held_bytes(trace)
    return freed >= _LEAST_BYTES * bare.timeline().peak_bytes


def _held_bytes(trace: Trace) -> int:
    at = trace.backward_from
    return int(trace.nbytes[(trace.birth <= at) & (trace.death > at)].sum())
