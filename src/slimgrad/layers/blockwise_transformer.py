"""Attention and feed-forward computed together, block by block of tokens: a layer saves its input and no more.

Formula: y_b = finish(x_b, softmax(scale q_b k^T) v)
    with q_b = queries(x_b) for each block b of tokens, and k, v = keys_values(x) of the whole sequence
Memory: activations fall to the layer's input (with ``keep_attention``: the attention's output and one number a token
    and head too): what norms, projections, the residual and the feed-forward network save is of one block, while
    that block runs. While a layer runs, forward or backward, its keys and values are whole, and in the backward pass
    their gradients; gradients of weights are summed over the blocks, so that twice those of one layer are alive.
    At width 32, 8 heads, a feed-forward network four times as wide and float32 each further layer saves 128 bytes a
    token, its input. One layer's forward and backward pass takes 768 bytes a token over a constant, with tiled
    attention alone 2,864. Under 3 MiB, weights included, the ledger finds room for 2,816 tokens in one layer, where tiled
    attention alone has room for 1,024 and whole score matrices for 168.
    With three layers it is 1,920, 320 and 112.
    Time: the layer's forward pass is run once more, its attention twice more unless it is kept.
Exactness: exact up to rounding: softmax over tiles of keys, and weights' gradients summed block by block. Random numbers
    that the modules draw are drawn again in the backward pass; with dropout in the attention its masks are those of
    ``memory_efficient_attention``.
Limits: the three modules must treat every token alone (linear layers, layer or RMS norms, activations, dropout), in
    training as in evaluation; modules with batch statistics are refused. Forward hooks on them, and inside them, fire for
    each block and again in the backward pass. What differs from token to token, such as rotary tables, goes through
    ``along`` and gets no gradient. A double backward is refused: UnsupportedError.
References: Liu and Abbeel, Blockwise Parallel Transformer for Long Context Large Models, arXiv 2305.19370: section 3,
    algorithm 1. *departs:* keys and values of the whole sequence are held while the layer runs, where the
    paper's figure for a layer also counts them; the backward pass is written out block by block, and recomputes
    everything from the layer's input, which the paper leaves to checkpointing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slimgrad.errors import MethodError
from slimgrad.layers.attention_arguments import drawn_seed, mask_and_bias
from slimgrad.layers.attention_sweep import Rule
from slimgrad.layers.blockwise_sweep import BlockwiseLayer, Stages
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Blockwise Parallel Transformer for Long Context Large Models",
        "Hao Liu and Pieter Abbeel",
        2023,
        "2305.19370",
    ),
)
class BlockwiseTransformer(nn.Module):
    """A Transformer layer made of three modules that treat every token alone, run block by block.

    - ``queries(x)`` returns ``[B, H, n, D]`` for a block ``x`` of ``[B, n, C]``: norm, projection, heads apart;
    - ``keys_values(x)`` returns keys ``[B, K, n, D]`` and values ``[B, K, n, E]``; K divides H;
    - ``finish(x, attended)`` gets the block and its attention ``[B, H, n, E]``, and returns the layer's output
      ``[B, n, ...]``: output projection, residual, feed-forward network.

    Modules may share submodules and weights (one norm before both projections). ``dropout_p`` is for attention
    probabilities in training. ``scale`` is 1/sqrt(D) unless given. ``block_size`` is in tokens, of queries and feed-forward.

    Raises ``MethodError`` for options out of bounds and for modules that do not return what is written here.
    """

    def __init__(
        self,
        queries: nn.Module,
        keys_values: nn.Module,
        finish: nn.Module,
        *,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        block_size: int = 256,
        key_chunk: int = 256,
        keep_attention: bool = False,
    ) -> None:
        super().__init__()
        _check_options(dropout_p, block_size, key_chunk)
        for name, stage in (("queries", queries), ("keys_values", keys_values), ("finish", finish)):
            _check_stage(name, stage)
        self.queries, self.keys_values, self.finish = queries, keys_values, finish
        self.keep_attention = keep_attention
        self._rule = Rule(scale, block_size, key_chunk, dropout_p, is_causal)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        along: Sequence[Tensor] = (),
    ) -> Tensor:
        """The layer's output ``[B, N, ...]`` for ``x`` of ``[B, N, C]``.

        ``attn_mask`` and ``bias`` are as in ``memory_efficient_attention``. Each tensor of ``along`` is ``[..., N, z]``;
        the three modules are given its part for the block as a further argument.
        """
        if x.dim() != 3 or x.shape[1] == 0:
            raise MethodError(
                f"expected an input of (batch, tokens, features) with at least one token, found {tuple(x.shape)}"
            )
        for table in along:
            if table.dim() < 2 or table.shape[-2] != x.shape[1] or table.requires_grad:
                raise MethodError(
                    f"expected tensors of (..., {x.shape[1]}, width) without a gradient in along, found "
                    f"{tuple(table.shape)} (requires_grad={table.requires_grad})"
                )
        length = x.shape[1]
        mask, bias = mask_and_bias(attn_mask, bias, (x.shape[0], None, length, length))
        stages = Stages(
            self.queries,
            self.keys_values,
            self.finish,
            self._rule_now(x),
            self.keep_attention,
            tuple(along),
        )
        return BlockwiseLayer.apply(x, bias, mask, stages, *stages.parameters())  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Its options, for ``repr``."""
        rule = self._rule
        return (
            f"is_causal={rule.is_causal}, dropout_p={rule.dropout_p}, block_size={rule.query_chunk}, "
            f"key_chunk={rule.key_chunk}, keep_attention={self.keep_attention}"
        )

    def _rule_now(self, x: Tensor) -> Rule:
        dropout_p = self._rule.dropout_p if self.training else 0.0
        seed = drawn_seed(x) if dropout_p else 0
        return dataclasses.replace(self._rule, dropout_p=dropout_p, seed=seed)


def _check_options(dropout_p: float, block_size: int, key_chunk: int) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise MethodError(f"expected dropout_p in [0, 1], found {dropout_p}")
    if block_size < 1 or key_chunk < 1:
        raise MethodError(
            f"expected blocks of at least one token, found block_size={block_size} and key_chunk={key_chunk}"
        )


def _check_stage(name: str, stage: object) -> None:
    if not isinstance(stage, nn.Module):
        raise MethodError(
            f"expected {name} to be an nn.Module, found {type(stage).__name__}: its parameters' gradients are summed "
            "over the blocks, so they must be known"
        )
    mixing = [type(m).__name__ for m in stage.modules() if isinstance(m, _NormBase)]
    if mixing:
        raise MethodError(
            f"expected {name} to treat every token alone, found {mixing[0]}: its statistics span the sequence"
        )
