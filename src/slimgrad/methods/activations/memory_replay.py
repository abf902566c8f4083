"""Backpropagation through time that keeps the memory between segments alone and runs each segment again.

Formula: M_{t+1}, O_t = model(x_t, M_t) without a graph for t = 1 ... T; then for t = T ... 1 again with one, and one
    backward from L_t = loss(O_t) and from M_{t+1} with dL/dM_{t+1}, which gives dL/dw its part and dL/dM_t
Memory: activations fall from T a to a + T m, with a what one segment saves and m the memory. Time: one more forward pass
    of all segments but the last.
Exactness: exact: full backpropagation through time up to the rounding of a sum over segments. Random numbers are those of
    a segment's first run, autocast is the caller's, and buffers that a forward pass changes count once.
Limits: ``loss_fn`` is called from the last segment to the first, so it should draw no random numbers. Hooks on gradients
    fire once a segment. What the model reaches besides its arguments must have no graph of its own. Modules whose
    buffers are looked after are those named, or that the model is or belongs to. In torch.distributed these average
    gradients with the first segment, which comes last, alone. T m grows with the length.
References: Wu et al. (2020), Memformer, section 4, algorithm 1. *departs:* the loss and the next memory's gradient go
    backward in one pass; losses are summed as they are; the last segment is run once; the initial memory gets its
    gradient too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.batches import map_tensors, named_tensors
from slimgrad.errors import ArgumentError, BatchError, LossError
from slimgrad.method import Paper, component
from slimgrad.methods.activations.replayed_calls import (
    CutOff,
    Scale,
    TwoRuns,
    as_leaves,
    backward_from,
    gradients_of,
    modules_of,
)
from slimgrad.types import Column, Exactness

Model = Callable[[Any, Any], tuple[Any, Any]]
"""``output, memory = model(segment, memory)``, as ``nn.LSTM`` has it."""


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Memformer: A Memory-Augmented Transformer for Sequence Modeling",
        "Qingyang Wu, Zhenzhong Lan, Kun Qian, Jing Gu, Alborz Geramifard, Zhou Yu",
        2020,
        "2010.06891",
    ),
)
def memory_replay(
    model: Model,
    segments: Sequence[Any],
    memory: Any,
    loss_fn: Callable[[Any, int], Tensor | None],
    *,
    modules: Sequence[nn.Module] = (),
    scale: Scale | None = None,
) -> tuple[Tensor, Any]:
    """Forward and backward of the sum over t of ``loss_fn(output, t)``; the sum and the last memory, both detached.

    ``output, memory = model(segment, memory)`` for each of ``segments``; a memory is a tensor or a nest of them (the
    state of ``nn.LSTM``). ``loss_fn(output, t)`` is the loss of segment t, or None where it has none. Gradients are
    added to ``.grad``, those of the initial memory and of the segments too where they require one. ``modules``
    are those that ``model`` runs, where it is not itself one; ``scale`` (``GradScaler.scale``) is applied to
    each loss for backward only. Raises ``BatchError`` without segments, ``ArgumentError`` for a model that returns
    no pair and ``LossError`` where no segment has a loss, or one that is no scalar with a gradient.
    """
    if not len(segments):
        raise BatchError("there are no segments: give one or more")
    cut = CutOff((segments, memory))
    parts, first = cut.leaves
    used = (*modules_of(model), *modules)
    runs, memories = _forward(model, parts[:-1], first, used)
    runs.append(TwoRuns(used))  # the last segment's only run has a graph
    total, last_memory, gradients = None, None, dict[str, Tensor]()
    for t in reversed(range(len(parts))):
        before = first if t == 0 else as_leaves(memories.pop())
        with runs.pop().with_graph([] if t == 0 else runs[0].averaging):
            output, after = _pair(model(parts[t], before))
            loss = loss_fn(output, t)
            backward_from(loss, named_tensors(after), gradients, scale)
        if loss is not None:
            total = loss.detach() if total is None else total + loss.detach()
        if t == len(parts) - 1:
            last_memory = map_tensors(Tensor.detach, after)
        del output, after, loss  # their graph would keep the memory
        gradients = gradients_of(before)
    if total is None:
        raise LossError("loss_fn returned None for every segment: at least one needs a loss")
    cut.give_back()
    return total, last_memory


def _forward(
    model: Model, segments: Sequence[Any], memory: Any, modules: Sequence[nn.Module]
) -> tuple[list[TwoRuns], list[Any]]:
    """The first runs, and the memory after each of ``segments``."""
    runs: list[TwoRuns] = []
    memories: list[Any] = []
    for segment in segments:
        run = TwoRuns(modules, runs[-1] if runs else None)
        with run.without_graph():
            _, memory = _pair(model(segment, memory))
        runs.append(run)
        memories.append(map_tensors(Tensor.detach, memory))
    torch.clear_autocast_cache()  # weights cast without a graph would get no gradient
    return runs, memories


def _pair(returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise ArgumentError(
            f"expected output, memory = model(segment, memory), found {type(returned).__name__}"
        )
    return returned[0], returned[1]
