"""Running a user's optimizer on one parameter, or on a part of one, and showing by value that this is allowed.

Nothing here knows an optimizer's formula. ``step_parameter`` hands the user's own optimizer a single parameter;
``step_part`` hands it a flat slice of one with slices of its state. Whether that gives what the whole step
gives is not assumed from a name: ``is_separable`` and ``is_elementwise`` run the optimizer's own code both ways
on small tensors and compare every bit.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_LENGTH, _SLICE = 1003, 37


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The param group that holds ``parameter``; raises KeyError if none does."""
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    raise KeyError("the optimizer does not hold this parameter")


@contextmanager
def _only(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor
) -> Generator[dict[str, Any]]:
    """The optimizer with one group of one parameter; what its step writes into the group is kept."""
    narrowed = {**group, "params": [parameter]}
    groups, optimizer.param_groups = optimizer.param_groups, [narrowed]
    try:
        yield narrowed
    finally:
        optimizer.param_groups = groups


def plain_step(optimizer: Optimizer) -> None:
    """The optimizer's own step, past hooks and scheduler wrappers: those see one call per logical step."""
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)


def step_parameter(
    optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any] | None = None
) -> None:
    """Update one parameter from its ``.grad`` with the user's optimizer, its group and its state."""
    with torch.no_grad(), _only(optimizer, group or group_of(optimizer, parameter), parameter):
        plain_step(optimizer)


def step_part(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    part: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
) -> dict[str, Any]:
    """Update ``part``, a view of a parameter's elements, from ``gradient`` with ``state`` of the part's shape.

    Tensors of ``state`` with the part's shape are updated in place; the returned state holds the new values of
    everything else (step counts). An empty ``state`` lets the optimizer make its own.
    """
    part = part.detach().requires_grad_()
    part.grad = gradient
    try:
        if state:
            optimizer.state[part] = state
        step_parameter(optimizer, part, group)
        return dict(optimizer.state.get(part, {}))
    finally:
        optimizer.state.pop(part, None)
        part.grad = None


def clone_for(optimizer: Optimizer, groups: list[list[Tensor]]) -> Optimizer:
    """A new optimizer of the user's class and hyperparameters over ``groups``, with no state and no hooks.

    Group ``i`` takes the hyperparameters of the user's group ``i`` (counted round where there are more).
    """
    fresh = Optimizer([torch.zeros(1)], {})
    twin = copy.copy(optimizer)
    twin.__dict__ = {**optimizer.__dict__, **fresh.__dict__, "defaults": dict(optimizer.defaults)}
    twin.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the user's optimizer
    twin.param_groups = [
        {
            **_without_parameters(optimizer.param_groups[i % len(optimizer.param_groups)]),
            "params": list(g),
        }
        for i, g in enumerate(groups)
    ]
    return twin


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _samples(optimizer: Optimizer) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Small parameters of the user's numbers of dimensions, dtype and device, and gradients for three steps."""
    theirs = [p for group in optimizer.param_groups for p in group["params"]]
    dims = sorted({p.dim() for p in theirs}) or [1]
    shapes = [tuple((5, 3, 2, 2, 2, 2)[:dim]) for dim in dims] + [
        tuple((4, 6, 3, 2, 2, 2)[:dim]) for dim in dims
    ]
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> Tensor:
        sample = torch.randn(shape, generator=generator)
        return sample.to(theirs[0].device, theirs[0].dtype) if theirs else sample

    parameters = [make(shape).requires_grad_() for shape in shapes]
    return parameters, [[make(shape) for shape in shapes] for _ in range(3)]


def is_separable(optimizer: Optimizer) -> bool:
    """Whether updating parameters one at a time gives the bits of the optimizer's own step.

    Runs both on small tensors, three steps, with the user's hyperparameters; an optimizer that needs a closure
    or looks across parameters (LBFGS) fails.
    """
    try:
        parameters, gradients = _samples(optimizer)
        alone = [p.detach().clone().requires_grad_() for p in parameters]
        together_opt = clone_for(optimizer, [parameters])
        alone_opt = clone_for(optimizer, [alone])
        for step in gradients:
            for p, q, g in zip(parameters, alone, step, strict=True):
                p.grad, q.grad = g.clone(), g.clone()
            plain_step(together_opt)
            for q in reversed(alone):
                step_parameter(alone_opt, q)
        return all(torch.equal(p, q) for p, q in zip(parameters, alone, strict=True))
    except Exception:
        return False


def is_sliceable(optimizer: Optimizer, group_index: int, dtype: torch.dtype) -> bool:
    """Whether slices cut anywhere give the bits of the whole update, for one param group and dtype.

    Shown by value, three steps. A kernel may round the last few elements, which do not fill a vector register,
    in another way than the rest (bfloat16 SGD with momentum does): a cut moves them, so such an optimizer is
    not sliceable. A tensor of 24 elements cannot show this; 1003 elements in slices of 37 do.
    """
    device = optimizer.param_groups[group_index]["params"][0].device
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(_LENGTH, generator=generator).to(device, dtype) for _ in range(4)]
    whole, parts = draws[0].clone().requires_grad_(), draws[0].clone()
    groups: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    groups[group_index] = [whole]
    try:
        twin = clone_for(optimizer, groups)
        _three_steps(twin, twin.param_groups[group_index], whole, parts, draws[1:])
    except Exception:
        return False
    return torch.equal(whole, parts)


def _three_steps(
    twin: Optimizer, group: dict[str, Any], whole: Tensor, parts: Tensor, gradients: list[Tensor]
) -> None:
    states: dict[int, dict[str, Any]] = {}
    for gradient in gradients:
        whole.grad = gradient.clone()
        step_parameter(twin, whole, group)
        for start in range(0, _LENGTH, _SLICE):
            part, part_gradient = (x[start : start + _SLICE] for x in (parts, gradient))
            states[start] = step_part(twin, group, part, part_gradient, states.get(start, {}))


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether every parameter of the optimizer may be updated in slices (``is_sliceable``)."""
    kinds = {(i, p.dtype) for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    return bool(kinds) and all(is_sliceable(optimizer, *kind) for kind in kinds)
