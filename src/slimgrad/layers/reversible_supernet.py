"""A network of mixed operations to search a layer's architecture in, reversible, so that depth costs no activations.

Formula: y_k = x_k + o_k(mean of the other streams), o_k = sum_i softmax(alpha_k)_i o_ki, k = 1..n in turn, for each
    block; the blocks of a cell have their own alpha, and every repetition of the cell the same. Search: in turns,
    weights on a batch of one half of the data, alpha on a batch of the other.
Memory: activations are those of the n streams after the last block, whatever the depth; backward has the candidates
    of one mixed operation at a time. Gradients are the weights' in one half step, alpha's in the other.
    Time: the forward pass of all candidates once more.
Exactness: exact: weights and alpha get autograd's gradients at the reconstructed streams (see reversible_sequence).
    The search is of first order: alpha's gradient is taken at the weights as they are, not at those which they
    would become.
Limits: those of reversible_sequence. The chosen cell is to be trained anew. The share of an operation is no proof of its worth:
    parameter-free candidates can get large shares early, because they need no training; ``exclude`` leaves them out.
References: Zhao et al., Memory-Efficient Differentiable Transformer Architecture Search, equations 3 to 5 (streams,
    pooling, mixed operation) and algorithms 1 (backward with reconstruction) and 2 (search); Liu et al., DARTS,
    section 2.3 (first order). *departs:* streams are pooled by their mean (the paper has the maximum, a
    little better, and the mean); no dynamic convolutions and no cross-attention among the ready candidates, which normalise
    what they are given instead of their residual sum; the searched cell is reversible when it is trained, where
    the paper stores activations (``is_reversible = False`` does).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeAlias

from torch import nn

from slimgrad.errors import ArgumentError
from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.layers.mixed_operation import MixedOperation, new_alpha
from slimgrad.layers.reversible_sequence import ReversibleSequence
from slimgrad.layers.sequence_operations import Operations
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness

Cell: TypeAlias = tuple[tuple[str, ...], ...]
"""The operation of each stream, block by block."""


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Memory-Efficient Differentiable Transformer Architecture Search",
        "Yuekai Zhao, Li Dong, Yelong Shen, Zhihua Zhang, Furu Wei, Weizhu Chen",
        2021,
        "2105.14669",
    ),
)
class ReversibleSupernet(ReversibleSequence):
    """``num_cells`` repetitions of a cell of ``cell_length`` blocks of ``num_streams`` mixed operations.

    ``operations`` make the candidates (``sequence_operations`` has ready ones); ``options`` are those of
    ReversibleSequence. Train it with ``architecture_search.search``, then make ``cell_sequence`` of its ``cell()``.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        num_streams: int = 2,
        cell_length: int = 1,
        num_cells: int = 1,
        **options: Any,
    ) -> None:
        if min(cell_length, num_cells) < 1:
            raise ArgumentError(
                f"expected cell_length and num_cells of 1 or more, found {cell_length}, {num_cells}"
            )
        alphas = [
            [new_alpha(len(operations)) for _ in range(num_streams)] for _ in range(cell_length)
        ]

        def mixed(alpha: nn.Parameter) -> MixedOperation:
            made = {name: None if make is None else make() for name, make in operations.items()}
            return MixedOperation(made, alpha)

        super().__init__(
            (ReversibleBlock(*map(mixed, row)) for _ in range(num_cells) for row in alphas),
            **options,
        )
        self.cell_length = cell_length

    def cell(self, exclude: Collection[str] = ()) -> Cell:
        """The operations with the largest shares, those of the names in ``exclude`` apart."""
        return tuple(
            tuple(f.chosen(exclude) for f in block.functions if isinstance(f, MixedOperation))
            for block in self._blocks()[: self.cell_length]
        )


def cell_sequence(
    operations: Operations, cell: Cell, *, num_cells: int = 1, **options: Any
) -> ReversibleSequence:
    """``num_cells`` repetitions of ``cell`` with new weights. Raises ArgumentError for a name that is not there."""
    unknown = sorted({name for row in cell for name in row} - set(operations))
    if unknown:
        raise ArgumentError(f"expected operations among {list(operations)}, found {unknown}")

    def made(name: str) -> nn.Module | None:
        make = operations[name]
        return None if make is None else make()

    return ReversibleSequence(
        (ReversibleBlock(*map(made, row)) for _ in range(num_cells) for row in cell), **options
    )
