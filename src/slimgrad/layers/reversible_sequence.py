"""A chain of reversible blocks that keeps only its last outputs and reconstructs the rest during backward.

Formula: y_k = s_k x_k + F_k(mean of the other streams), k = 1..n in turn; x_k = (y_k - F_k(...)) / s_k, k = n..1.
    With n = 2 and s = 1 this is y1 = x1 + F(x2), y2 = x2 + G(y1).
Memory: activations are those of one output of the chain, whatever its depth (and 5 KB of the host's for each function that
    draws random numbers). Backward has one function's graph at a time; with ``overlap``, two functions'.
    Time: each function's forward pass once more.
Exactness: exact: the gradient is autograd's at the reconstructed streams, whose rounding errors grow with depth by the
    functions' Lipschitz constants, and by 1 / s where scales are below 1. ``reconstruction_error`` measures it,
    ``max_error`` refuses a chain above it. With ``wide``, streams below float64 are held in float64 on a grid of 2^-22:
    reconstruction under scales of powers of two is exact to the bit until 53 bits are used up, and the forward
    pass differs from the floating one by up to 2^-23 for each addition. With ``fixed_point=b`` reconstruction is exact to the bit; then the
    forward pass differs from the floating one by up to 2^-(b+1) for each addition, and the gradient is that of
    the rounded streams, straight through the rounding.
Limits: double backward, functions that change their input in place or use parameters that are not theirs, and
    parameters changed between forward and backward raise errors. Streams are of one shape. Python's and NumPy's random
    numbers are not replayed.
References: Gomez et al., The Reversible Residual Network, section 3.1 and algorithm 1 (two streams); Zhao et al.,
    Memory-Efficient Differentiable Transformer Architecture Search, equations 3 and 4 (n streams, reconstructed from
    the last outputs). *departs:* of the paper's two poolings of the other streams, maximum and mean, here is the
    mean; one autograd node a block, so that gradients of a block's parameters are complete, and may be used up,
    before the next block is reconstructed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # pyright: ignore[reportUnknownVariableType]

from slimgrad.errors import ArgumentError, UnsupportedError
from slimgrad.layers.coupling import (
    FLOATING,
    Arithmetic,
    BlockCall,
    FixedPoint,
    ReversibleBlock,
    Wide,
)
from slimgrad.layers.overlap_times import OverlapTimes, copied_blocks, time_overlap
from slimgrad.layers.recomputed_ahead import Ahead
from slimgrad.layers.reversible_backward import Carried, Extras, Link, differentiate
from slimgrad.measuring.randomness import kept_randomness
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness


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
class ReversibleSequence(nn.Module):
    """Blocks of one number of streams, in a row; ``forward`` takes and returns a sequence of streams.

    ``max_error`` bounds the relative error of the reconstructed inputs, measured at the first forward pass with
    gradients of each dtype and shape. ``fixed_point`` is a number of fraction bits; ``wide`` holds
    the streams in float64. ``overlap`` reconstructs a function on a second thread while the one after it is
    differentiated: on one core no gain; "auto" times it at the first pass with gradients and keeps to what was
    faster (see pareprop). ``is_reversible = False`` keeps everything, as plain autograd does.
    """

    def __init__(
        self,
        blocks: Iterable[ReversibleBlock],
        *,
        max_error: float | None = None,
        fixed_point: int | None = None,
        overlap: bool | Literal["auto"] = False,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        counts = {block.num_streams for block in self._blocks()}
        if len(counts) != 1:
            raise ArgumentError(f"expected blocks of one number of streams, found {sorted(counts)}")
        if fixed_point is not None and any(set(b.scales) != {1.0} for b in self._blocks()):
            raise ArgumentError("expected scales of 1 with fixed_point: other products lose bits")
        if fixed_point is not None and wide:
            raise ArgumentError(
                "expected fixed_point or wide, found both: streams are held one way"
            )
        if overlap not in (True, False, "auto"):
            raise ArgumentError(f'expected overlap of True, False or "auto", found {overlap!r}')
        self.max_error = max_error
        self.fixed_point = fixed_point
        self.overlap: bool | Literal["auto"] = overlap
        self.wide = wide
        self.is_reversible = True
        self._measured: set[Any] = set()
        self._times: OverlapTimes | None = None

    def forward(self, streams: Sequence[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The streams after the last block. ``args`` and ``kwargs`` go to every function."""
        self._check(streams)
        if not self.is_reversible or (not torch.is_grad_enabled() and self.fixed_point is None):
            for block in self.blocks:
                streams = block(streams, *args, **kwargs)
            return tuple(streams)
        return _Pass(self, Extras.of(args, kwargs)).run(tuple(streams))

    def overlap_times(
        self,
        streams: Sequence[Tensor],
        *args: Any,
        num_blocks: int = 4,
        num_runs: int = 5,
        **kwargs: Any,
    ) -> OverlapTimes:
        """Seconds of copies of the first blocks, overlapped and in order. Nothing of the chain is changed."""
        self._check(streams)
        trial = ReversibleSequence(
            copied_blocks(self._blocks()[:num_blocks]),
            fixed_point=self.fixed_point,
            wide=self.wide,
        )
        return time_overlap(trial, streams, (args, kwargs), num_runs)

    def overlaps(self, streams: Sequence[Tensor], extras: tuple[Any, Any]) -> bool:
        """What ``overlap`` says; "auto" is timed once, but not under a dispatch mode (a ledger) or without gradients."""
        if self.overlap != "auto":
            return self.overlap
        can_time = torch.is_grad_enabled() and not _get_current_dispatch_mode_stack()
        if self._times is None and can_time:
            args, kwargs = extras
            self._times = self.overlap_times(streams, *args, **kwargs)
        return self._times is not None and self._times.is_faster

    def arithmetic(self) -> Arithmetic:
        """How streams are held between blocks."""
        if self.fixed_point is not None:
            return FixedPoint(self.fixed_point)
        return Wide() if self.wide else FLOATING

    def _blocks(self) -> list[ReversibleBlock]:
        return [block for block in self.blocks if isinstance(block, ReversibleBlock)]

    def _check(self, streams: Sequence[Tensor]) -> None:
        num = self._blocks()[0].num_streams
        shapes = {tuple(x.shape) for x in streams}
        if len(streams) != num or len(shapes) != 1:
            raise ArgumentError(
                f"expected {num} streams of one shape, found {[tuple(x.shape) for x in streams]}"
            )


@dataclass
class _Pass:
    """One forward pass of a chain."""

    chain: ReversibleSequence
    extras: Extras
    calls: list[BlockCall] = field(default_factory=list)

    def run(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One node of the graph for each block."""
        chain, arithmetic = self.chain, self.chain.arithmetic()
        ahead = Ahead.of(chain.overlaps(streams, self.extras.plain()))
        carried = Carried([arithmetic.enter(x.detach()) for x in streams], ahead)
        dtypes = [x.dtype for x in streams]
        first = list(carried.held) if self._is_to_be_measured(streams) else None
        blocks = chain._blocks()
        for index, block in enumerate(blocks):
            link = Link(
                index, block, arithmetic, dtypes, carried, self.extras, index + 1 == len(blocks)
            )
            parameters = [p for p in block.parameters() if p.requires_grad]
            streams = differentiate(link, streams, parameters)
            dtypes = block.rotated(dtypes)
            if first is not None:
                assert link.call is not None
                self.calls.append(link.call)
        if first is not None:
            self._measure(first, carried)
        carried.held = []
        return streams

    def _is_to_be_measured(self, streams: tuple[Tensor, ...]) -> bool:
        if self.chain.max_error is None:
            return False
        key = (
            tuple((x.dtype, x.shape) for x in streams),
            torch.is_autocast_enabled(streams[0].device.type),
        )
        is_new = key not in self.chain._measured
        self.chain._measured.add(key)
        return is_new

    def _measure(self, first: list[Tensor], carried: Carried) -> None:
        held, extras = list(carried.held), self.extras.plain()
        for call in reversed(self.calls):
            held = call.block.unrotated(held)
            for _ in call.reconstruct(held, extras, graph=False):
                pass
        error, limit = _relative_error(held, first), self.chain.max_error
        if limit is not None and not error <= limit:
            self.chain._measured.clear()
            raise UnsupportedError(
                f"{len(self.calls)} blocks reconstruct their input in {first[0].dtype} with a relative error of "
                f"{error:.1e}, above max_error={limit:.1e}; use fewer blocks in a chain, larger scales, a wider "
                "dtype or fixed_point"
            )


def reconstruction_error(
    model: nn.Module, *args: Any, **kwargs: Any
) -> dict[str, tuple[float, ...]]:
    """For each chain in ``model``: the relative error of the reconstructed inputs of its blocks, first block first.

    Runs ``model(*args, **kwargs)`` once, without gradients, keeping every stream. An error is the largest over
    streams of |reconstructed - stored| / |stored|, in the 2-norm. Buffers and random states are put back.
    """
    found: dict[str, tuple[float, ...]] = {}
    chains = [(name, m) for name, m in model.named_modules() if isinstance(m, ReversibleSequence)]
    if not chains:
        raise ArgumentError(f"expected a ReversibleSequence in {type(model).__name__}, found none")

    def measured(name: str, chain: ReversibleSequence) -> Any:
        def hook(_module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            found[name] = _errors_by_depth(chain, given[0], (given[1:], options))

        return chain.register_forward_pre_hook(hook, with_kwargs=True)

    buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.clone()
    hooks = [measured(*pair) for pair in chains]
    try:
        with kept_randomness(), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
    return found


def _errors_by_depth(
    chain: ReversibleSequence, streams: Sequence[Tensor], extras: tuple[Any, Any]
) -> tuple[float, ...]:
    arithmetic = chain.arithmetic()
    held, dtypes = [arithmetic.enter(x) for x in streams], [x.dtype for x in streams]
    stored, calls = list[list[Tensor]](), list[BlockCall]()
    for block in chain._blocks():
        stored.append(held)
        call, held = BlockCall.run(block, arithmetic, held, dtypes, extras)
        dtypes = block.rotated(dtypes)
        calls.append(call)
    errors: list[float] = []
    for call, before in zip(reversed(calls), reversed(stored), strict=True):
        held = call.block.unrotated(held)
        for _ in call.reconstruct(held, extras, graph=False):
            pass
        errors.append(_relative_error(held, before))
    return tuple(reversed(errors))


def _relative_error(found: Sequence[Tensor], stored: Sequence[Tensor]) -> float:
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, stored, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)
