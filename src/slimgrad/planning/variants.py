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
_QUICK = 1.5  # times the plain step's operations: tracing takes as long again

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
        firsts: set[Method] = set()  # of each method's settings the first that is combined
        for name, cls in _rewriting():
            with attached(host, max(joined, key=len)):
                settings = cls.settings(host, batch)
            if isinstance(settings, Refusal):
                refusals[name] = settings.reason
                continue
            attempt = functools.partial(_attempt, host, batch, paths, keys, refusals)
            if _is_refinement(cls):
                most = _QUICK * bare.num_ticks
                leading = max((c for c in joined if firsts.issuperset(c)), key=len)
                few = [c for c in joined if found[c].num_ticks <= most or c is leading]
                reason = _refine(found, few, settings, attempt)
                if reason is not None:
                    refusals.setdefault(name, reason)
                    continue
            else:
                _add(found, joined, settings, attempt)
                firsts.update([setting for setting in settings if (setting,) in joined][:1])
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
    found: dict[Combination, Trace],
    combinations: Sequence[Combination],
    settings: Sequence[Method],
    attempt: Callable[[Combination], Trace | None],
) -> str | None:
    """Trace each setting alone and, where the step keeps less with it, with each of ``combinations``.

    Why none is kept, if so: then it costs nothing in planning.
    """
    bare, reason = found[()], "the step cannot be traced with it"
    for combination in combinations:  # nothing is the first of them
        for setting in settings:
            if combination and (setting,) not in found:
                continue
            trace = attempt((*combination, setting))
            if trace is None:
                continue
            if not combination and not _keeps_less(bare, trace):
                least = format_bytes(_LEAST_BYTES * bare.timeline().peak_bytes)
                reason = f"what the step keeps for backward would fall by less than {least}"
                continue
            found[*combination, setting] = trace
    return None if any((setting,) in found for setting in settings) else reason


def _rewriting() -> list[tuple[str, type[Any]]]:
    """The methods that rewrite the step and do not compile it, refinements last."""
    named = catalogue.methods().items()
    traced_so = [(n, c) for n, c in named if isinstance(c, Rewriting) and not _compiles(c)]
    return sorted(traced_so, key=lambda item: _is_refinement(item[1]))


def _compiles(cls: object) -> bool:
    return getattr(cls, "compiles", False)


def _is_refinement(cls: object) -> bool:
    return getattr(cls, "is_refinement", False)


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
