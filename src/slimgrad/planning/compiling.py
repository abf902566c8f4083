"""Which blocks are worth compiling for a measurement, and the table of what they then take."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping

from slimgrad.errors import PlanError
from slimgrad.host import Host
from slimgrad.measuring.compiled_code import cpp_compiler, first_line, unmark_later
from slimgrad.measuring.compiled_cost import captured_inputs, compiled_cost
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.measuring.trace import Trace
from slimgrad.method import CompiledCost
from slimgrad.planning.calls import call_seconds

DEFAULT_STEPS = 1000  # of a run, where the user says nothing
COMPILE_S = 30.0  # what one set of equal blocks is expected to take
USUAL_GAIN = 0.1  # of a block's seconds
_REFUSALS = 5  # reasons told in full


def check_steps(steps: int | None) -> int:
    """The number of steps that compiling is paid off over; raises ``PlanError`` for what is none."""
    if steps is None:
        return DEFAULT_STEPS
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"steps must be a positive whole number or None, not {steps!r}")
    return steps


def equal_blocks(host: Host, trace: Trace) -> list[list[str]]:
    """Paths of blocks of one class that run the same operations on the same shapes, the costliest set first."""
    alike: dict[object, list[str]] = {}
    seconds: dict[object, float] = {}
    calls: dict[str, list[int]] = {}
    for index, call in enumerate(trace.calls):
        calls.setdefault(call.path, []).append(index)
    for path, indices in calls.items():
        first = trace.calls[indices[0]]
        forward = trace.op[first.forward_from : first.forward_to].tolist()
        backward = trace.op[(trace.op_call == indices[0]) & trace.op_backward].tolist()
        key = (type(host.model.get_submodule(path)), tuple(forward), tuple(backward))
        if not backward:
            continue
        alike.setdefault(key, []).append(path)
        both = [call_seconds(trace, tuple(indices), backward=b) for b in (False, True)]
        seconds[key] = seconds.get(key, 0.0) + sum(both)
    return [alike[key] for key in sorted(alike, key=lambda k: -seconds[k])]


def compiled_costs(
    host: Host,
    batch: object,
    trace: Trace,
    allow: bool | None,
    steps: int,
    limit_s: float,
) -> tuple[dict[str, CompiledCost], str | None]:
    """What each block takes once compiled, by path; and why not, for those that are left out.

    One block of each set of equal ones is compiled, where that is allowed (None: where it may pay off within
    ``steps``), until ``limit_s`` seconds are spent.
    """
    reason = why_nothing(host, allow)
    if reason is not None:
        return {}, reason
    wanted = [g for g in equal_blocks(host, trace) if allow or _may_pay(trace, g, steps)]
    if not wanted:
        return {}, (
            f"compiling would take longer than it can save within {steps} steps (pass steps=, or allow_compile=True)"
        )
    return _measured(host, batch, wanted, limit_s)


def why_nothing(host: Host, allow: bool | None) -> str | None:
    """Why nothing of a model may be compiled; None where it may."""
    if allow is False:
        return "compiling was not allowed (allow_compile=False)"
    if any(is_fake(p) for p in host.model.parameters()):
        return "compiled code is measured for real, and this model has no memory behind it"
    if host.device.type == "cpu" and cpp_compiler() is None:
        return "no C++ compiler is found (g++ or clang++)"
    return None


def _may_pay(trace: Trace, paths: list[str], steps: int) -> bool:
    calls = tuple(i for i, c in enumerate(trace.calls) if c.path in set(paths))
    seconds = sum(call_seconds(trace, calls, backward=b) for b in (False, True))
    return USUAL_GAIN * seconds * steps > COMPILE_S


def _measured(
    host: Host, batch: object, groups: list[list[str]], limit_s: float
) -> tuple[dict[str, CompiledCost], str | None]:
    costs: dict[str, CompiledCost] = {}
    reasons: dict[str, str] = {}
    deadline = time.perf_counter() + limit_s
    undo = switch_off_cache(host.model)
    undo.then(unmark_later(host.model))
    try:
        firsts, device = [paths[0] for paths in groups], host.device.type
        inputs = captured_inputs(host.model, host.loss_fn, batch, firsts, device)
        for paths in groups:
            if paths[0] not in inputs:
                continue
            if time.perf_counter() > deadline:
                reasons[paths[0]] = f"compiling others took the {limit_s:.0f} s that it may take"
                continue
            blocks = [host.model.get_submodule(path) for path in paths]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of compilers, about their own code
                    twin = blocks[1] if len(blocks) > 1 else None
                    cost = compiled_cost(blocks[0], twin, inputs.pop(paths[0]), len(blocks))
            except Exception as error:  # torch.compile fails in as many ways as there are models
                reasons[paths[0]] = first_line(error)
            else:
                costs |= dict.fromkeys(paths, cost)
    except Exception as error:
        reasons["the model"] = first_line(error)
    finally:
        undo()
    return costs, _told(reasons)


def _told(reasons: Mapping[str, str]) -> str | None:
    shown = [f"{path}: {reason}" for path, reason in list(reasons.items())[:_REFUSALS]]
    return "; ".join(shown) or None
