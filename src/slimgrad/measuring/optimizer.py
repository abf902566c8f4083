"""What an optimizer keeps and needs, parameter by parameter, learnt by running it: no formula of any optimizer.

Bytes come from the optimizer's own step on meta tensors of the parameters' shapes; where that cannot run, from
small real tensors, scaled. Seconds come from a real step on at most a million elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from slimgrad.errors import UnsupportedError
from slimgrad.measuring.ledger import Ledger
from slimgrad.measuring.randomness import kept_randomness
from slimgrad.measuring.stopwatch import seconds_of
from slimgrad.optimizers import clone_for, is_elementwise, is_separable, step_parameter

_SAMPLE = 1 << 20


@dataclass(frozen=True)
class ParameterLaw:
    """One parameter: its state's bytes, and what its update alone needs beside weight, gradient and state."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    state_bytes: int
    transient_bytes: int


@dataclass(frozen=True)
class OptimizerLaw:
    """What ``optimizer.step()`` keeps and needs. ``step_transient_bytes`` is that of the whole step at once."""

    parameters: tuple[ParameterLaw, ...]
    step_transient_bytes: int
    seconds_per_element: float
    separable: bool
    elementwise: bool
    state_tensors: int

    @property
    def state_bytes(self) -> int:
        """Bytes kept from step to step."""
        return sum(p.state_bytes for p in self.parameters)


def no_optimizer(parameters: Sequence[tuple[str, Tensor]]) -> OptimizerLaw:
    """The law where nothing is updated."""
    laws = tuple(
        ParameterLaw(n, tuple(p.shape), p.numel() * p.element_size(), 0, 0) for n, p in parameters
    )
    return OptimizerLaw(laws, 0, 0.0, False, False, 0)


def optimizer_law(optimizer: Optimizer, names: dict[int, str]) -> OptimizerLaw:
    """Learn the law of ``optimizer``; ``names`` maps ``id(parameter)`` to a name. The optimizer is not changed."""
    groups = [[p for p in g["params"] if p.requires_grad] for g in optimizer.param_groups]
    with kept_randomness():
        by_shape: dict[Any, tuple[int, int, int]] = {}
        laws: list[ParameterLaw] = []
        tensors = 0
        for index, group in enumerate(groups):
            for p in group:
                key = (index, tuple(p.shape), p.dtype)
                if key not in by_shape:
                    by_shape[key] = _alone(optimizer, index, p)
                state, transient, count = by_shape[key]
                tensors = max(tensors, count)
                nbytes = p.numel() * p.element_size()
                laws.append(
                    ParameterLaw(names.get(id(p), "?"), tuple(p.shape), nbytes, state, transient)
                )
        return OptimizerLaw(
            tuple(laws),
            _whole_step_transient(
                optimizer, groups, max((w.transient_bytes for w in laws), default=0)
            ),
            _seconds_per_element(optimizer, groups),
            is_separable(optimizer),
            is_elementwise(optimizer),
            tensors,
        )


def _twin(optimizer: Optimizer, groups: list[list[Tensor]]) -> Optimizer:
    twin = clone_for(optimizer, groups)
    if groups and groups[0] and groups[0][0].is_meta and torch.cuda.is_available():
        for group in twin.param_groups:  # what the default resolves to on CUDA
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
    return twin


def _alone(optimizer: Optimizer, group: int, parameter: Tensor) -> tuple[int, int, int]:
    """State bytes, transient bytes and state tensors of the parameter's own shape, of one parameter."""
    try:
        return _run_alone(optimizer, group, _meta(parameter))
    except Exception:
        small = _shrunk(parameter)
        try:
            state, transient, count = _run_alone(optimizer, group, small)
        except Exception as error:
            raise UnsupportedError(
                f"{type(optimizer).__name__}.step() cannot be run as step() after backward(): {error}. "
                "Optimizers that need a closure (LBFGS) are not supported"
            ) from error
        ratio = parameter.numel() / max(small.numel(), 1)
        return int(state * ratio), int(transient * ratio), count


def _run_alone(optimizer: Optimizer, group: int, parameter: Tensor) -> tuple[int, int, int]:
    parameter = parameter.detach().requires_grad_()
    twin = _twin(optimizer, [[] for _ in range(group)] + [[parameter]])
    transient = 0
    for _ in range(2):  # the first step makes the state, the second is like all others
        parameter.grad = torch.zeros_like(parameter)
        with Ledger(
            optimizer=twin, inputs=(parameter, parameter.grad), device=parameter.device
        ) as ledger:
            before = ledger.now_bytes
            step_parameter(twin, parameter)
        transient = ledger.peak_bytes - before
    state = [v for v in twin.state.get(parameter, {}).values() if isinstance(v, Tensor)]
    held = [v for v in state if v.device == parameter.device and v.numel() > 1]
    same = sum(1 for v in held if v.shape == parameter.shape)
    return sum(v.numel() * v.element_size() for v in held), max(transient, 0), same


def _meta(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


def _shrunk(parameter: Tensor) -> Tensor:
    shape = list(parameter.shape)
    while np.prod(shape, dtype=np.int64) > _SAMPLE // 16:
        largest = int(np.argmax(shape))
        shape[largest] = max(1, shape[largest] // 2)
    return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)


def _whole_step_transient(optimizer: Optimizer, groups: list[list[Tensor]], fallback: int) -> int:
    try:
        metas = [[_meta(p).requires_grad_() for p in g] for g in groups]
        twin = _twin(optimizer, metas)
        peak = 0
        for _ in range(2):
            for p in (p for g in metas for p in g):
                p.grad = torch.zeros_like(p)
            owned = [p for g in metas for p in g] + [p.grad for g in metas for p in g]
            with Ledger(optimizer=twin, inputs=owned, device=torch.device("meta")) as ledger:
                before = ledger.now_bytes
                twin.step()
            peak = ledger.peak_bytes - before
        return max(peak, 0)
    except Exception:
        return fallback


def _seconds_per_element(optimizer: Optimizer, groups: list[list[Tensor]]) -> float:
    """Seconds of an update an element, from a real parameter of the usual kind."""
    candidates = [p for g in groups for p in g]
    if not candidates:
        return 0.0
    model = max(candidates, key=lambda p: min(p.numel(), _SAMPLE))
    shape = list(model.shape)
    while np.prod(shape, dtype=np.int64) > _SAMPLE:
        shape[int(np.argmax(shape))] //= 2
    try:
        p = torch.zeros(shape, dtype=model.dtype, device=model.device).requires_grad_()
        twin = clone_for(optimizer, [[p]])
        taken: list[float] = []
        for _ in range(4):
            p.grad = torch.full_like(p, 0.01)
            taken.append(seconds_of(functools.partial(step_parameter, twin, p), p.device))
        return float(np.median(taken[1:])) / max(p.numel(), 1)
    except Exception:
        return 0.0
