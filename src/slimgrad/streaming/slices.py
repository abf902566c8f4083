"""Where a parameter may be cut, and whether its optimizer allows it."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from slimgrad.optimizers import clone_for, step_parameter, step_part

Cut: TypeAlias = tuple[int, int]
"""``(start, end)`` of a slice of a parameter's elements in flat order."""

_LENGTH, _SLICE = 1003, 37


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


def cuts_of(num_elements: int, size: int) -> list[Cut]:
    """Slices of ``size`` elements; none of one element, whose state would look like a step count.

    >>> cuts_of(9, 4)
    [(0, 4), (4, 7), (7, 9)]
    """
    starts = list(range(0, num_elements, size))
    if len(starts) > 1 and num_elements - starts[-1] == 1:
        starts[-1] -= 1
    return list(zip(starts, [*starts[1:], num_elements], strict=True))
