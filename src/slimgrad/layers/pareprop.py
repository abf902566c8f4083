"""Reversible backpropagation on two threads: what comes next is reconstructed while a function is differentiated.

Formula: while the gradients of function j are computed, the inputs and the graph of function j - 1 are made from its
    outputs, over the borders of blocks. Whether it pays is timed on copies of the chain's first blocks, in turns
    with the same in order, and it is chosen only where it is faster by more than 5 %.
Memory: activations are those of the chain in order, and one function's more, whatever the depth. The timing has copies
    of ``num_blocks`` blocks and their gradients. Time: at best that of a pass that stores
    everything, where there is a free core or device for the second thread.
Exactness: exact: bit-equal to the chain's gradients in order, which are autograd's at the reconstructed streams.
Limits: on one core there is no gain, and it is never chosen: 12 blocks of attention and feed-forward network of width 128
    on 8 x 128 tokens took 1.01 times as long (one core of an AMD EPYC, torch 2.13, 2026-11-28; docs/own_code.md has
    another chain). No gain was measured yet where cores are free. Passes in
    order are timed with twice the threads too, so that two threads are compared with two. On CUDA both threads launch
    their kernels into one stream, which runs them in order. Blocks that cannot be copied are refused.
References: Zhu and Mangalam, PaReprop: Fast Parallelized Reversible Backpropagation, abstract (recomputation in parallel
    with gradients). *departs:* one function ahead, half a block of two streams, where the paper takes whole blocks; threads
    of the CPU in place of CUDA streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slimgrad.layers.overlap_times import OverlapTimes
from slimgrad.layers.reversible_sequence import ReversibleSequence
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "PaReprop: Fast Parallelized Reversible Backpropagation",
        "Tyler Zhu, Karttikeya Mangalam",
        2023,
        "2306.09342",
    ),
)
def pareprop(
    chain: ReversibleSequence,
    streams: Sequence[Tensor],
    *args: Any,
    num_blocks: int = 4,
    num_runs: int = 5,
    **kwargs: Any,
) -> OverlapTimes:
    """Time ``chain``'s first blocks on inputs like its own, set its ``overlap`` to what was faster, and tell both.

    ``ReversibleSequence(..., overlap="auto")`` does so at its first pass with gradients. No parameter, buffer, gradient or
    random state is changed, no hook is called.
    """
    times = chain.overlap_times(streams, *args, num_blocks=num_blocks, num_runs=num_runs, **kwargs)
    chain.overlap = times.is_faster
    return times
