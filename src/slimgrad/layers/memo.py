"""Moves what a share of a layer's tokens save to files, and recomputes what the others save from the layer's input.

Formula: y = after(x, a), a = softmax(scale q k^T) v, q, k, v = before(x). Of the N tokens the first s = round(alpha N) are
    swapped: what before and after save for them, and their q, k and v, are written in forward and read in backward; for
    the other N - s both are run again. x, a and the log-sum-exp of a are always written.
    ``share_that_hides``: the largest alpha with (bytes(x) + bytes(a) + alpha bytes(rest)) / write <= seconds(layer)
    and layers (bytes(x) + bytes(a) + alpha bytes(rest)) <= host bytes.
Memory: activations: nothing between a layer's forward and backward but storages below ``min_bytes``; in its backward x,
    a, q, k, v, and what N - s tokens save at once; what s tokens save comes back tensor by tensor. Files: x, a and
    alpha of the rest. Time: 1 - alpha of the layer's forward pass but for its attention, which is not run again.
Exactness: exact up to rounding: softmax over tiles of keys; weights' gradients are summed over the two parts. Random
    numbers that the modules draw are drawn again in the backward pass.
Limits: ``before`` and ``after`` must treat every token alone and draw alike in both passes; modules with batch statistics
    are refused. Attention is over all tokens, or causal, without mask, bias or dropout: Llama layers that are given a
    mask raise ``UnsupportedError``. One backward pass, no double backward. No plan chooses it: which tokens a tensor
    belongs to, and where attention mixes them, is not in the record of a block; selective_recompute moves and
    recomputes whole tensors of any block, and is what plans choose from.
References: Zhao et al. (2024): token-wise recomputation and swapping, a layer's input and attention swapped whole; the
    packing on two levels is ``slimgrad.arena``. *departs:* to pinned memory on CUDA, to a file on the CPU;
    what is swapped is what autograd saves, each storage once, not a list for one model; no rounding buffers: reads are
    made when backward asks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.attention_sweep import Rule
from slimgrad.layers.llama_halves import After, Before, llama_layers
from slimgrad.layers.swapped_tokens import Halves, SwappedTokens, without_gradients
from slimgrad.method import Paper, Undo, component
from slimgrad.replaced_forward import replace_forward
from slimgrad.storage import Store
from slimgrad.storage.choosing import open_store
from slimgrad.types import Column, Exactness


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Efficiently Training 7B LLM with 1 Million Sequence Length on 8 GPUs",
        "Pinxue Zhao, Hailin Zhang, Fangcheng Fu, Xiaonan Nie, Qibin Liu, Fang Yang, Yuanbo Peng, Dian Jiao, "
        "Shuaipeng Li, Jinbao Xue, Yangyu Tao, Bin Cui",
        2024,
        "2407.12117",
    ),
)
class Memo(nn.Module):
    """A Transformer layer made of two modules that treat every token alone, with a share ``alpha`` of tokens swapped.

    - ``before(x)`` returns queries ``[B, H, n, D]``, keys ``[B, K, n, D]`` and values ``[B, K, n, E]`` for some tokens
      ``x`` of ``[B, n, C]``; K divides H;
    - ``after(x, attended)`` gets those tokens and their attention ``[B, H, n, E]``, and returns the layer's output.

    Files are in ``folder`` (None: the system's temporary one); layers may share a ``store``. Storages below
    ``min_bytes`` stay in memory. ``Memo.on(model)`` does it to every layer of a Llama-like model (SmolLM2) in place.
    Raises ``MethodError`` for options out of bounds and for modules that return something else.
    """

    def __init__(
        self,
        before: nn.Module,
        after: nn.Module,
        alpha: float = 0.5,
        *,
        is_causal: bool = True,
        scale: float | None = None,
        store: Store | None = None,
        folder: Path | None = None,
        min_bytes: int = 4096,
        block_size: int = 256,
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise MethodError(f"expected alpha, a share of the tokens, in [0, 1], found {alpha}")
        if min_bytes < 1 or block_size < 1:
            raise MethodError(
                f"expected min_bytes and block_size of at least 1, found {min_bytes} and {block_size}"
            )
        _check_by_token(before, after)
        self.before, self.after = before, after
        self.alpha, self.min_bytes = alpha, min_bytes
        self._rule = Rule(scale, block_size, block_size, 0.0, is_causal)
        self._store, self._folder = store, folder

    def forward(self, x: Tensor, *, along: Sequence[Tensor] = ()) -> Tensor:
        """The layer's output ``[B, N, ...]`` for ``x`` of ``[B, N, C]``.

        Each tensor of ``along`` is ``[..., N, z]``, without a gradient; both modules are given its part for their
        tokens as a further argument.
        """
        if x.dim() != 3 or x.shape[1] == 0:
            raise MethodError(
                f"expected an input of (batch, tokens, features) with at least one token, found {tuple(x.shape)}"
            )
        halves = Halves(
            self.before,
            self.after,
            self._rule,
            self.store_for(x.device),
            round(self.alpha * x.shape[1]),
            self.min_bytes,
            tuple(along),
        )
        if not torch.is_grad_enabled():
            return without_gradients(halves, x)
        return SwappedTokens.apply(x, halves, *halves.parameters())  # type: ignore[no-any-return]

    def store_for(self, device: torch.device) -> Store:
        """Where tensors of ``device`` go, opened when it is first asked for."""
        if self._store is None:
            self._store = open_store(device, self._folder or Path(tempfile.gettempdir()))
        return self._store

    @staticmethod
    def on(
        model: nn.Module, alpha: float = 0.5, *, folder: Path | None = None, min_bytes: int = 4096
    ) -> Undo:
        """Swap a share ``alpha`` of the tokens in every layer of a Llama-like model, in place; they share one store.

        Parameters and their names stay. Raises ``UnsupportedError`` where the model has no such layers.
        """
        undo, layers = Undo(), llama_layers(model)
        device = next(model.parameters()).device
        store = open_store(device, folder or Path(tempfile.gettempdir()))
        forward = _forward_with(alpha, store, min_bytes)
        for layer in layers:
            undo.then(replace_forward(layer, forward))
        return undo

    @staticmethod
    def share_that_hides(
        always_bytes: int,
        other_bytes: int,
        layer_s: float,
        write_bytes_s: float,
        *,
        num_layers: int = 1,
        host_bytes: float = float("inf"),
    ) -> float:
        """The largest alpha in [0, 1] whose writes are over when a layer is, and that fit into ``host_bytes``.

        ``always_bytes``: a layer's input and attention; ``other_bytes``: what else it saves; ``layer_s``: its forward
        pass. Where even alpha = 0 does not fit it is 0: the paper's programme has no answer then.
        """
        room = min(layer_s * write_bytes_s, host_bytes / num_layers) - always_bytes
        return max(0.0, min(1.0, room / max(other_bytes, 1)))

    def extra_repr(self) -> str:
        """Its options, for ``repr``."""
        return f"alpha={self.alpha}, is_causal={self._rule.is_causal}, block_size={self._rule.query_chunk}"


def _forward_with(alpha: float, store: Store, min_bytes: int) -> Callable[..., Any]:
    def forward(
        layer: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not torch.is_grad_enabled():
            given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            return type(layer).forward(layer, hidden_states, **given, **kwargs)
        if attention_mask is not None or position_embeddings is None:
            raise UnsupportedError(
                "expected a causal layer without a mask that is given its position_embeddings: leave padding out of the "
                'batch, and let attention be causal by itself (attn_implementation="sdpa")'
            )
        before, after = Before(layer), After(layer)  # of this layer: it may be a deep copy
        scale = layer.self_attn.scaling
        memo = Memo(before, after, alpha, scale=scale, store=store, min_bytes=min_bytes)
        return memo(hidden_states, along=position_embeddings)

    return forward


def _check_by_token(*modules: nn.Module) -> None:
    for module in modules:
        mixing = [type(m).__name__ for m in module.modules() if isinstance(m, _NormBase)]
        if mixing:
            raise MethodError(
                f"expected modules that treat every token alone, found {mixing[0]}: its statistics span the sequence"
            )
