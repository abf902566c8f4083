"""Checkpoints as a user would write them: on every block, on some, over runs of blocks, with a policy inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from slimgrad.method import Undo

ContextFn = Callable[[], Any]


def every_block(chains: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each block a segment of its own."""
    return [[path] for chain in chains for path in chain]


def every_second_block(chains: Sequence[Sequence[str]]) -> list[list[str]]:
    """The first, third, fifth ... block of all, each a segment.

    >>> every_second_block([["a", "b", "c"], ["d", "e"]])
    [['a'], ['c'], ['e']]
    """
    return every_block(chains)[::2]


def root_segments(chains: Sequence[Sequence[str]]) -> list[list[str]]:
    """Runs of blocks of one length, about the square root of the number of blocks of them; none crosses a chain.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, section 4.

    >>> [len(segment) for segment in root_segments([list("abcdefghi"), list("jk")])]
    [4, 4, 1, 2]
    """
    num_blocks = sum(map(len, chains))
    length = math.ceil(num_blocks / max(1, round(math.sqrt(num_blocks))))
    return [
        list(chain[start : start + length])
        for chain in chains
        for start in range(0, len(chain), length)
    ]


def attach_checkpoints(
    model: nn.Module, segments: Sequence[Sequence[str]], context_fn: ContextFn = noop_context_fn
) -> Undo:
    """Run each segment of blocks under one ``torch.utils.checkpoint`` (not reentrant); the undo takes them off.

    The first block of a segment runs all of it, the others hand on what they get: the model's own code, which
    calls each block in turn, stays as it is.
    """
    undo = Undo()
    for segment in segments:
        blocks = [model.get_submodule(path) for path in segment]
        _replace(blocks[0], _checkpointed([b.forward for b in blocks], context_fn), undo)
        for block in blocks[1:]:
            _replace(block, _handed_on, undo)
    return undo


def _replace(block: nn.Module, forward: Callable[..., Any], undo: Undo) -> None:
    block.forward = forward
    undo.then(lambda: delattr(block, "forward"))


def _checkpointed(
    forwards: Sequence[Callable[..., Any]], context_fn: ContextFn
) -> Callable[..., Any]:
    def run(x: Any, *args: Any, **kwargs: Any) -> Any:
        for forward in forwards:
            x = forward(x, *args, **kwargs)
        return x

    def under_checkpoint(x: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, x, *args, use_reentrant=False, **kwargs)

    def under_policy(x: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, x, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    return under_checkpoint if context_fn is noop_context_fn else under_policy


def _handed_on(x: Any, *_args: Any, **_kwargs: Any) -> Any:
    return x


_SAVED = {  # what PyTorch's own examples of selective checkpointing save, and convolutions
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = getattr(operation, "__name__", "").partition(".")[0]
    known = isinstance(operation, torch._ops.OpOverload) and operation.namespace == "aten"
    if known and name in _SAVED:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


saving_products: ContextFn = partial(create_selective_checkpoint_contexts, _policy)
"""A ``context_fn`` under which the results of matrix products, attention and convolutions are saved."""
