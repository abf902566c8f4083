"""A Transformer layer in blocks of tokens, forward and backward, as one function that saves its input.

Shapes: ``B`` samples, ``N`` tokens, ``C`` features, ``n`` tokens of one block; ``H``, ``K``, ``D``, ``E`` as in
``attention_sweep``. The layer is ``y = finish(x, attend(queries(x), keys_values(x)))`` with three modules that treat
every token alone, so each can be run on any block of tokens, and be run again there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.errors import MethodError
from slimgrad.layers.attention_sweep import Rule, Sums
from slimgrad.layers.chunked_attention import TiledAttention
from slimgrad.layers.replayed_randomness import Draws, RandomStates
from slimgrad.single_backward import without_second

Attended = tuple[Tensor, Tensor]
"""Outputs of attention and their log-sum-exp, for one block of queries."""


@dataclass(frozen=True)
class Stages:
    """The three modules of a layer and its rule; ``along`` are tensors that they read beside ``x``, cut as it is."""

    queries: nn.Module
    keys_values: nn.Module
    finish: nn.Module
    rule: Rule
    keep_attention: bool = False
    along: tuple[Tensor, ...] = ()

    def parameters(self) -> list[nn.Parameter]:
        """What requires a gradient in the three modules, each once."""
        modules = nn.ModuleList([self.queries, self.keys_values, self.finish])
        return [p for p in modules.parameters() if p.requires_grad]

    def cut(self, rows: slice) -> list[Tensor]:
        """The part of each tensor in ``along`` for a block; its dimension -2 is that of the tokens."""
        return [t[..., rows, :] for t in self.along]

    def blocks(self, length: int) -> list[slice]:
        """The blocks of ``length`` tokens."""
        size = self.rule.query_chunk
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@dataclass
class Replay:
    """What a forward pass notes for the backward pass: random states before each call, and the autocast."""

    draws: Draws
    autocast: Callable[[], AbstractContextManager[Any]]
    states: dict[tuple[nn.Module, int], RandomStates] = field(default_factory=dict)

    @staticmethod
    def begun(device: torch.device) -> Replay:
        """Note the autocast that is on now."""
        kind = device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return Replay(Draws(device), lambda: torch.autocast(kind, dtype, enabled))

    def call(self, stage: nn.Module, rows: slice, *inputs: Tensor) -> Any:
        """``stage(*inputs)`` with the random numbers of its first call on this block."""
        place = stage, rows.start
        if place in self.states:
            self.draws.rewind(self.states[place])
        else:
            self.states[place] = self.draws.note()
        with self.autocast():
            return stage(*inputs)


class _Layer:
    """One pass over a layer: its keys and values are made at once, what follows block by block."""

    def __init__(
        self,
        x_BNC: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stages: Stages,
        replay: Replay,
    ) -> None:
        self.x_BNC, self.bias, self.mask = x_BNC, bias, mask
        self.stages, self.replay = stages, replay
        self.blocks = stages.blocks(x_BNC.shape[1])
        self.key, self.value = self._keys_values()
        self._attention: TiledAttention | None = None

    def call(self, stage: nn.Module, rows: slice, *inputs: Tensor) -> Any:
        """A stage on one block, the block's part of ``along`` given last."""
        return self.replay.call(stage, rows, *inputs, *self.stages.cut(rows))

    def attention(self, query: Tensor) -> TiledAttention:
        """What all queries attend to; ``query`` tells how many heads they have."""
        if self._attention is None:
            _check_heads(query, self.key, self.value, self.mask, self.bias)
            heads, length = query.shape[1], self.x_BNC.shape[1]
            self._attention = TiledAttention(
                self.key, self.value, self.bias, self.mask, self.stages.rule, heads, length
            )
        return self._attention

    def attend(self, query: Tensor, rows: slice) -> Attended:
        """Attention of one block of queries."""
        with torch.autocast(query.device.type, enabled=False):
            return self.attention(query).attend(query, rows)

    def _keys_values(self) -> tuple[Tensor, Tensor]:
        whole: list[Tensor] = []
        for rows in self.blocks:
            pair = self.call(self.stages.keys_values, rows, self.x_BNC[:, rows])
            if not whole:
                _check_pair(pair, rows)
                whole = [self._whole(part, -2) for part in pair]
            for all_rows, part in zip(whole, pair, strict=True):
                all_rows[:, :, rows] = part
        return whole[0], whole[1]

    def _whole(self, part: Tensor, dim: int) -> Tensor:
        shape = list(part.shape)
        shape[dim] = self.x_BNC.shape[1]
        return part.new_empty(shape)

    def outputs(self) -> tuple[Tensor, list[Tensor]]:
        """``[B, N, ...]``, and what is kept of attention: outputs and log-sum-exp of each block, if at all."""
        kept: list[Tensor] = []
        whole: list[Tensor] = []
        for rows in self.blocks:
            x_BnC = self.x_BNC[:, rows]
            query = self.call(self.stages.queries, rows, x_BnC)
            attended = self.attend(query, rows)
            if self.stages.keep_attention:
                kept += attended
            y_BnC = self.call(self.stages.finish, rows, x_BnC, attended[0])
            if not whole:
                _check_output(y_BnC, x_BnC)
                whole = [self._whole(y_BnC, 1)]
            whole[0][:, rows] = y_BnC
        return whole[0], kept


class _Gradients:
    """The backward pass: each block's forward is run again, and its gradients are added up."""

    def __init__(self, layer: _Layer, parameters: Sequence[Tensor], needs_bias: bool) -> None:
        self.layer, self.parameters, self.needs_bias = layer, list(parameters), needs_bias
        self.sums: list[Tensor | None] = [None] * len(parameters)
        self.grad_x_BNC = torch.empty_like(layer.x_BNC)

    def run(self, grad_y_BNC: Tensor, kept: Sequence[Tensor]) -> Tensor | None:
        """All of it; the gradient in the bias, where it needs one."""
        layer = self.layer
        sums: Sums | None = None
        for number, rows in enumerate(layer.blocks):
            attended = (kept[2 * number], kept[2 * number + 1]) if kept else None
            x_BnC, query = self._again(layer.stages.queries, rows)
            if sums is None:
                sums = layer.attention(query).sums(layer.bias if self.needs_bias else None)
            out, lse = attended or layer.attend(query.detach(), rows)
            x_in_finish, out_leaf, y_BnC = self._finish_again(rows, out)
            grad_x, grad_out = self._pull([y_BnC], [grad_y_BNC[:, rows]], [x_in_finish, out_leaf])
            with torch.autocast(query.device.type, enabled=False):
                grad_query = layer.attention(query).pull_back(
                    query.detach(), rows, out, lse, grad_out, sums
                )
            (from_query,) = self._pull([query], [grad_query], [x_BnC])
            # not in place: what autograd returns may share memory with the incoming gradient
            self.grad_x_BNC[:, rows] = grad_x + from_query
        assert sums is not None
        for rows in layer.blocks:
            x_BnC, pair = self._again(layer.stages.keys_values, rows)
            grads = [
                total[:, :, rows].to(part.dtype) for total, part in zip(sums[:2], pair, strict=True)
            ]
            (from_pair,) = self._pull(list(pair), grads, [x_BnC])
            self.grad_x_BNC[:, rows] += from_pair
        if sums.bias is None or layer.bias is None:
            return None
        return sums.bias.to(layer.bias.dtype)

    def _again(self, stage: nn.Module, rows: slice) -> tuple[Tensor, Any]:
        leaf = self.layer.x_BNC[:, rows].detach().requires_grad_()
        with torch.enable_grad():
            return leaf, self.layer.call(stage, rows, leaf)

    def _finish_again(self, rows: slice, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out_leaf = out.detach().requires_grad_()
        leaf = self.layer.x_BNC[:, rows].detach().requires_grad_()
        with torch.enable_grad():
            return leaf, out_leaf, self.layer.call(self.layer.stages.finish, rows, leaf, out_leaf)

    def _pull(self, outs: list[Tensor], grads: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        """The gradients in ``leaves``; those in parameters are added to their sums."""
        inputs = [*leaves, *self.parameters]
        found = cast(
            Sequence[Tensor | None], torch.autograd.grad(outs, inputs, grads, allow_unused=True)
        )
        for index, grad in enumerate(found[len(leaves) :]):
            total = self.sums[index]
            if grad is not None:
                self.sums[index] = grad.clone() if total is None else total.add_(grad)
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found, strict=False)
        ]


class BlockwiseLayer(torch.autograd.Function):
    """The layer of ``stages``; ``parameters`` are theirs, given so that their gradients are this function's."""

    @staticmethod
    def forward(  # noqa: D102 - torch's own name
        ctx: Any,
        x_BNC: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stages: Stages,
        *parameters: Tensor,
    ) -> Tensor:
        replay = Replay.begun(x_BNC.device)
        y_BNC, kept = _Layer(x_BNC, bias, mask, stages, replay).outputs()
        ctx.save_for_backward(x_BNC, bias, mask, *stages.along, *parameters, *kept)
        ctx.stages, ctx.replay, ctx.parameters = stages, replay, parameters
        return y_BNC

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (grad_y_BNC,) = grad_outputs
        saved = (
            ctx.saved_tensors
        )  # that of parameters is asked for too: it tells if they were changed since
        x_BNC, bias, mask = saved[:3]
        kept = saved[3 + len(ctx.stages.along) + len(ctx.parameters) :]
        with torch.no_grad(), ctx.replay.draws.replaying():
            layer = _Layer(x_BNC, bias, mask, ctx.stages, ctx.replay)
            gradients = _Gradients(layer, ctx.parameters, ctx.needs_input_grad[1])
            grad_bias = gradients.run(grad_y_BNC, kept)
        grads = (gradients.grad_x_BNC, grad_bias, *gradients.sums)
        sources = (x_BNC, bias, *ctx.parameters, grad_y_BNC)
        grad_x, grad_bias, *rest = without_second("blockwise_transformer", grads, sources)
        return (grad_x, grad_bias, None, None, *rest)


def _check_pair(pair: Any, rows: slice) -> None:
    length = rows.stop - rows.start
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not all(
        isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == length for t in pair
    ):
        found = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in pair]
        raise MethodError(
            f"expected keys_values to return keys and values of (batch, heads, {length}, width), found {found}"
        )


def _check_heads(query: Tensor, key: Tensor, value: Tensor, *added: Tensor | None) -> None:
    fits = query.dim() == 4 and query.shape[3] == key.shape[3] and key.shape[1] == value.shape[1]
    for given in added:
        if fits and given is not None and given.shape[1] not in (1, query.shape[1]):
            raise MethodError(
                f"expected a mask or bias of 1 or {query.shape[1]} heads, found {tuple(given.shape)}"
            )
    if not fits or query.shape[1] % key.shape[1]:
        raise MethodError(
            "expected queries of (batch, heads, length, width) as wide as keys, and a number of key/value heads that "
            f"divides theirs, found queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)}"
        )


def _check_output(y_BnC: Any, x_BnC: Tensor) -> None:
    if not isinstance(y_BnC, Tensor) or y_BnC.shape[:2] != x_BnC.shape[:2]:
        found = tuple(y_BnC.shape) if isinstance(y_BnC, Tensor) else type(y_BnC).__name__
        raise MethodError(
            f"expected finish to return a tensor of {tuple(x_BnC.shape[:2])} (batch, tokens) and features, found {found}"
        )
