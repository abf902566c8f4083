"""What a step takes once its loss is compiled, the model within: traced and timed on real steps beside plain ones."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimgrad.errors import UnsupportedError
from slimgrad.host import LossFn, Share
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.stopwatch import in_turns, seconds_of
from slimgrad.measuring.trace import Trace, checked_loss, trace_step, untouched
from slimgrad.measuring.tracker import device_of

_LOSS_CHANGE = 5e-3  # of its value, along the gradient that is checked


@dataclass(frozen=True)
class CompiledStep:
    """The trace of a compiled forward and backward pass, and what both take as a share of the plain ones' seconds."""

    trace: Trace
    ratio: float
    forward_share: float  # of the compiled seconds
    compile_s: float

    def priced(self, plain_s: float) -> Trace:
        """The trace with seconds on the scale on which the plain passes take ``plain_s``."""
        trace = self.trace
        trace.is_timed = True
        for backward, share in ((False, self.forward_share), (True, 1 - self.forward_share)):
            mine = trace.op_backward == backward
            trace.op_seconds[mine] = plain_s * self.ratio * share / max(int(mine.sum()), 1)
        return trace


@dataclass
class _Run:
    """What one forward and backward pass gives."""

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    draws: bool
    compiled: bool


def compiled_step(
    model: nn.Module, loss_fn: LossFn, fast: LossFn, batch: Any, precision: float
) -> CompiledStep:
    """Check the gradient of ``fast``, the compiled ``loss_fn``, and measure a step with it. Changes nothing.

    ``precision`` is the epsilon of the coarsest floating dtype that the step computes in. Raises
    ``UnsupportedError`` where the gradient differs from plain's, or nothing was compiled, and what torch.compile
    raises.
    """
    begin = time.perf_counter()
    ours = _run(model, fast, batch)
    first_s = time.perf_counter() - begin
    if not ours.compiled:
        raise UnsupportedError("torch.compile made no code of it, and would run it as it is")
    _check(model, fast, batch, ours, _run(model, loss_fn, batch), precision)
    del ours
    shares = [Share(batch)]
    trace = trace_step(model, fast, shares, [], {}, fake=False, inside_compiled=True)
    trace.op_seconds = np.zeros(len(trace.op))
    storages = [storage for storage, _ in trace.gradients.values()]
    if len(set(storages)) < len(storages):
        raise UnsupportedError("gradients of several parameters come in one tensor")
    plain, made = _seconds(model, (loss_fn, fast), batch)
    ratio, compile_s = sum(made) / max(sum(plain), 1e-9), max(0.0, first_s - sum(made))
    return CompiledStep(trace, ratio, made[0] / max(sum(made), 1e-9), compile_s)


def _run(model: nn.Module, loss_fn: LossFn, batch: Any) -> _Run:
    with untouched(model):
        random = RandomState.now()
        loss = checked_loss(loss_fn(model, batch))
        compiled = _holds_compiled(loss)
        loss.backward()
        return _Run(
            float(loss.detach()),
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            {n: b.detach().clone() for n, b in model.named_buffers()},
            not RandomState.now().same_as(random),
            compiled,
        )


def _holds_compiled(loss: Tensor) -> bool:
    """Whether a node of the loss's autograd graph is compiled code."""
    met, nodes = set[Any](), [loss.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in met:
            continue
        if type(node).__name__ == "CompiledFunctionBackward":
            return True
        met.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _check(
    model: nn.Module, fast: LossFn, batch: Any, ours: _Run, plain: _Run, precision: float
) -> None:
    """The gradient is the plain step's; where random numbers are drawn, that of the compiled step's own loss."""
    if ours.gradients.keys() != plain.gradients.keys():
        raise UnsupportedError("other parameters get a gradient than in the plain step")
    if plain.draws:
        error, bound = _off_slope(model, fast, batch, ours, plain.gradients), 0.05
    else:
        bound = min(1e4 * precision, 0.2)
        error = _distance(ours.gradients, plain.gradients)
        if not _distance(ours.buffers, plain.buffers) <= bound:
            raise UnsupportedError("the compiled step leaves other buffers than the plain one")
    if not error <= bound:
        raise UnsupportedError(f"the compiled step's gradient is off by {error:.1e}")


def _distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    pairs = [(mine.double(), theirs[name].double()) for name, mine in ours.items()]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return (difference / size) ** 0.5 if size else float(difference > 0)


def _off_slope(
    model: nn.Module, fast: LossFn, batch: Any, ours: _Run, direction: Mapping[str, Tensor]
) -> float:
    """How far the loss's slope along ``direction`` is from what the gradient says, all draws the same.

    The direction is the plain step's gradient: along its own a gradient that lacks a part would go unnoticed.
    """
    told = sum(float((g.double() * direction[n].double()).sum()) for n, g in ours.gradients.items())
    scale = _LOSS_CHANGE * max(abs(ours.loss), 1e-6) / max(abs(told), 1e-30)
    leaves = {n: p for n, p in model.named_parameters() if n in direction}

    def at(times: float) -> float:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.add_(direction[name], alpha=times)
        with untouched(model):
            return float(fast(model, batch).detach())

    kept = {n: leaf.detach().clone() for n, leaf in leaves.items()}
    try:
        slope = (at(scale) - at(-2 * scale)) / (2 * scale)
    finally:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(kept[name])
    return abs(slope - told) / max(abs(told), 1e-30)


def _seconds(model: nn.Module, losses: Sequence[LossFn], batch: Any) -> list[tuple[float, float]]:
    """The least seconds of each loss's forward and backward pass, taken in turns."""
    device = device_of(model)

    def timed(loss_fn: LossFn) -> tuple[float, float]:
        loss: list[Tensor] = []
        with untouched(model):
            forward_s = seconds_of(lambda: loss.append(loss_fn(model, batch)), device)
            return forward_s, seconds_of(lambda: loss[0].backward(), device)

    taken = in_turns([functools.partial(timed, loss_fn) for loss_fn in losses])
    return [min(times, key=sum) for times in taken]
