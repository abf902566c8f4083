"""Tensor-parallel layers between which every process holds a part of the sequence: norms and dropouts are shared out.

Formula: with p processes, x = (x_1 ... x_p) along the sequence: a process normalises x_r alone; before a product whose
    columns are split, x is gathered; after one whose rows are split, partial sums are added up and scattered again:
    y_r = (sum_q h_q W_q^T)_r + b. Backward, a gather becomes a sum that is scattered, and the other way round
Memory: activations of norms, dropouts and residuals fall to 1/p, those of attention and feed-forward as well (their
    heads and columns are split). What a product gathered is not kept: backward gathers it again from the parts.
    Time: the same bytes between processes as tensor parallelism alone, and one gather more for each split product.
Exactness: exact: the whole layer's outputs and gradients up to rounding. Dropout draws each process's own masks.
Limits: the length of the sequence, the split features and the heads are multiples of the number of processes; norms
    must treat tokens alone; parameters that every process holds whole (norms, biases after rows) must be given to
    ``sum_gradients``. No double backward.
References: Korthikanti et al. (2022), sections 4.2.2 (the operators g and g-bar) and 4.2.1 for the split products.
    *departs:* where the backend has no reduce-scatter the sum goes to all, and each keeps its part.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimgrad.errors import ArgumentError, UnsupportedError
from slimgrad.method import Paper, Undo, component
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Reducing Activation Recomputation in Large Transformer Models",
        "Vijay Korthikanti, Jared Casper, Sangkug Lym, Lawrence McAfee, Michael Andersch, Mohammad Shoeybi, Bryan Catanzaro",
        2022,
        "2205.05198",
    ),
)
class SequenceParallel:
    """The processes of ``group`` (None: all) that share a sequence, which is dimension ``dim`` of its tensors.

    ``shard`` and ``unshard`` go from the whole sequence to a part and back; ``columns`` and ``rows`` make split
    layers from whole ones, which every process must have alike. Raises ``UnsupportedError`` where torch.distributed
    is not initialised, and ``ArgumentError`` for sizes that cannot be split.
    """

    def __init__(self, group: Any = None, dim: int = 1) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise UnsupportedError(
                "sequence parallelism needs processes: call torch.distributed.init_process_group"
            )
        self.group, self.dim = group, dim
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def shard(self, x: Tensor) -> Tensor:
        """This process's part of a sequence that every process has whole."""
        return cast(Tensor, _Shard.apply(x, self))

    def unshard(self, x: Tensor) -> Tensor:
        """The whole sequence, for a loss that every process computes alike."""
        return cast(Tensor, _Unshard.apply(x, self))

    def columns(self, linear: nn.Linear) -> ColumnLinear:
        """A layer that gathers the sequence and gives this process's share of the output features."""
        return ColumnLinear(linear, self)

    def rows(self, linear: nn.Linear) -> RowLinear:
        """A layer that takes this process's share of the input features, and gives its part of the sequence."""
        return RowLinear(linear, self)

    def sum_gradients(self, *modules: nn.Module) -> Undo:
        """Sum over all processes the gradients of what each of them holds whole, as soon as they are complete."""
        parameters = {p for m in modules for p in m.parameters() if p.requires_grad}

        def add_up(parameter: Tensor) -> None:
            dist.all_reduce(parameter.grad, group=self.group)

        handles = [p.register_post_accumulate_grad_hook(add_up) for p in parameters]
        return Undo(*(handle.remove for handle in handles))

    def part(self, whole: Tensor, dim: int | None = None) -> Tensor:
        """This process's slice of a tensor along ``dim``, a view. Raises ``ArgumentError`` where it cannot be split."""
        along = self.dim if dim is None else dim
        if whole.shape[along] % self.size:
            raise ArgumentError(
                f"expected dimension {along} of {tuple(whole.shape)} to be a multiple of {self.size}, the number of "
                "processes"
            )
        length = whole.shape[along] // self.size
        return whole.narrow(along, self.rank * length, length)

    def gathered(self, part: Tensor) -> Tensor:
        """The parts of all processes, in their order."""
        parts = [
            torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, self.dim)

    def scattered_sum(self, whole: Tensor) -> Tensor:
        """This process's part of the sum over all processes; ``whole`` may be used up."""
        if dist.get_backend(self.group) == "nccl":
            pieces = [p.contiguous() for p in whole.chunk(self.size, self.dim)]
            total = torch.empty_like(pieces[0])
            dist.reduce_scatter(total, pieces, group=self.group)
            return total
        total = whole.contiguous()
        dist.all_reduce(total, group=self.group)
        return self.part(total).clone()


class ColumnLinear(nn.Module):
    """``[..., T/p, I]`` of each process to ``[..., T, O/p]``: the sequence whole, the features split."""

    def __init__(self, linear: nn.Linear, parallel: SequenceParallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.weight = nn.Parameter(parallel.part(linear.weight.detach(), 0).clone())
        bias = None if linear.bias is None else parallel.part(linear.bias.detach(), 0).clone()  # pyright: ignore[reportUnnecessaryComparison]
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """This process's features of every token."""
        return cast(Tensor, _GatheredLinear.apply(x, self.weight, self.bias, self.parallel))


class RowLinear(nn.Module):
    """``[..., T, I/p]`` of each process to ``[..., T/p, O]``: the features whole, the sequence split."""

    def __init__(self, linear: nn.Linear, parallel: SequenceParallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.weight = nn.Parameter(parallel.part(linear.weight.detach(), 1).clone())
        bias = None if linear.bias is None else linear.bias.detach().clone()  # pyright: ignore[reportUnnecessaryComparison]
        self.bias = None if bias is None else nn.Parameter(bias)
        self.undo = Undo()
        if self.bias is not None:
            holder = nn.Module()
            holder.bias = self.bias
            self.undo = parallel.sum_gradients(holder)

    def forward(self, x: Tensor) -> Tensor:
        """Every feature of this process's tokens."""
        y = cast(Tensor, _ScatteredSum.apply(nn.functional.linear(x, self.weight), self.parallel))
        return y if self.bias is None else y + self.bias


class _Shard(torch.autograd.Function):
    """The gradient of each part is needed by all: they are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.parallel = parallel
        return parallel.part(x).clone()

    @staticmethod
    @single_backward("SequenceParallel")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.parallel.gathered(grads[0]), None


class _Unshard(torch.autograd.Function):
    """What follows is the same everywhere, and so is its gradient: each process takes its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.parallel = parallel
        return parallel.gathered(x)

    @staticmethod
    @single_backward("SequenceParallel")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.parallel.part(grads[0]).clone(), None


class _ScatteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.parallel = parallel
        return parallel.scattered_sum(partial)

    @staticmethod
    @single_backward("SequenceParallel")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.parallel.gathered(grads[0]), None


class _GatheredLinear(torch.autograd.Function):
    """Saves the part alone, and gathers it again for the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parallel: SequenceParallel
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parallel = parallel
        return nn.functional.linear(parallel.gathered(x), weight, bias)

    @staticmethod
    @single_backward("SequenceParallel")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), parallel, grad = ctx.saved_tensors, ctx.parallel, grads[0]
        rows = grad.reshape(-1, grad.shape[-1])
        dw = db = None
        if ctx.needs_input_grad[1]:
            dw = rows.t() @ parallel.gathered(x).reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return parallel.scattered_sum(grad @ weight), dw, db, None
