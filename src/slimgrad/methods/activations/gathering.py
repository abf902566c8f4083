"""The rows of every process, one behind the other, with gradients that flow back to where each row came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimgrad.errors import BatchError


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``rows`` [N, ...] of every process of ``group``, in order of rank: [world * N, ...].

    Its backward sums the gradients that all processes have for a row. Every process calls it, and its backward, in
    the same order. Without a process group it returns ``rows``. Raises ``BatchError`` where the shapes differ.
    """
    if not dist.is_initialized():
        return rows
    shapes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, tuple(rows.shape), group=group)
    if len(set(shapes)) != 1:
        raise BatchError(
            f"expected rows of one shape from every process, found {shapes}: drop the last, smaller batch"
        )
    return _Gather.apply(rows.contiguous(), group)  # pyright: ignore[reportReturnType]
