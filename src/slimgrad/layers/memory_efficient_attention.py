"""Softmax attention in tiles of queries and keys: no score matrix forward or backward, biases with a gradient included.

Formula: out_i = sum_j exp(s_ij - lse_i) v_j
    s = scale q k^T + bias, -inf where masked; lse_i = log sum_j exp(s_ij), both sums carried over chunks of keys
Memory: temporaries hold two tiles of scores (query_chunk x key_chunk a head, three with dropout) in place of two
    to four N x M matrices a head; activations are the output and one number a query and head beside q, k and v. For one
    head of 8,192 tokens and width 32 in float32 that is over 20 times less than plain attention takes, forward
    and backward, and linear in the length. A bias that needs a gradient costs that gradient. Working dtype: float32,
    or float64 for float64.
    Time: the scores are made once more in the backward pass, and chunks above the diagonal of causal attention are
    skipped. With a bias that is trained (4 heads, 2,048 tokens, docs/own_code.md) it took 0.96 of plain
    attention's time, torch's function 0.76; where torch's fused kernel serves, that one is faster.
Exactness: exact up to rounding; a row that may attend to nothing gives zeros, and passes no gradient, as with torch.
    With dropout the masks are others than torch's, of the same distribution: each tile's comes from a seed of its own
    and is drawn again in the backward pass.
Limits: four-dimensional inputs. A double backward is refused: UnsupportedError. A mask or bias of N x M entries that
    the caller makes is the caller's memory. Causal masks begin at the first query and key, as torch's
    ``is_causal`` does. ``backend="auto"`` takes torch's ``scaled_dot_product_attention`` where a fused kernel
    serves. Measured on torch 2.13 for the CPU (float16, bfloat16, float32, float64, grouped heads too): it is fused,
    and linear, for no mask, for causal attention and for additive masks without a gradient; it holds whole score
    matrices for a bias that requires a gradient, for dropout, and where values are of another width than keys; a
    boolean mask of N x M it makes a floating-point one, forward and backward. In those cases, and for a
    mask together with ``is_causal``, tiles are used.
References: Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, arXiv 2112.05682: sections 2 and 3 (running sums),
    figure 1 (chunks of queries and keys). *departs:* the maximum is carried over the chunks, not taken of
    each and corrected at the end; the backward pass is written out from the saved log-sum-exp, as in Dao et al.,
    FlashAttention, arXiv 2205.14135, appendix B.4, where the paper checkpoints each chunk.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from slimgrad.errors import MethodError
from slimgrad.layers.attention_arguments import drawn_seed, mask_and_bias
from slimgrad.layers.attention_sweep import Rule
from slimgrad.layers.chunked_attention import ChunkedAttention
from slimgrad.layers.fused_attention import torch_is_lean
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness

Backend: TypeAlias = Literal["auto", "chunked", "torch"]


@component(
    Column.TEMPORARIES,
    Exactness.EXACT,
    Paper(
        "Self-attention Does Not Need O(n^2) Memory",
        "Markus N. Rabe and Charles Staats",
        2021,
        "2112.05682",
    ),
)
def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_chunk: int = 256,
    key_chunk: int = 256,
    backend: Backend = "auto",
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` in memory linear in the length, for every argument.

    ``query`` is ``[B, H, N, D]``, ``key`` ``[B, K, M, D]`` and ``value`` ``[B, K, M, E]``, K = H or, with
    ``enable_gqa``, a divisor of it; the result is ``[B, H, N, E]``. ``attn_mask`` is boolean (True: attend) or added
    to the scores; ``bias`` is added too, so that both may be given. Each is broadcast to ``[B, H, N, M]``
    and may require a gradient. Under autocast all are cast first, as torch does.

    ``backend="auto"`` calls torch where that holds no score matrix, ``"torch"`` always, ``"chunked"`` never.
    Raises ``MethodError`` for arguments that do not fit together or that torch's function does not take.

    >>> q = k = torch.zeros(1, 1, 3, 2)
    >>> memory_efficient_attention(q, k, torch.eye(3)[None, None], is_causal=True, backend="chunked")[0, 0, 1].tolist()
    [0.5, 0.5, 0.0]
    """
    _check_shapes(query, key, value, enable_gqa)
    _check_options(dropout_p, query_chunk, key_chunk, backend)
    query, key, value, attn_mask, bias = _as_autocast(query, key, value, attn_mask, bias)
    mask, bias = mask_and_bias(attn_mask, bias, (*query.shape[:3], key.shape[2]))
    if backend == "torch" or (
        backend == "auto"
        and torch_is_lean(query, key, value, mask, bias, dropout_p, is_causal, enable_gqa)
    ):
        return _by_torch(query, key, value, mask, bias, dropout_p, is_causal, scale, enable_gqa)
    rule = Rule(
        scale, query_chunk, key_chunk, dropout_p, is_causal, drawn_seed(query) if dropout_p else 0
    )
    return ChunkedAttention.apply(query, key, value, bias, mask, rule)  # type: ignore[no-any-return]


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if mask is not None and bias is not None:
        raise MethodError(
            "torch's scaled_dot_product_attention takes one mask or bias, found both: use backend 'chunked'"
        )
    if is_causal and (mask is not None or bias is not None):
        raise MethodError(
            "torch's scaled_dot_product_attention takes no mask or bias with is_causal: use backend 'chunked'"
        )
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias if mask is None else mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _as_autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value, attn_mask, bias
    dtype = torch.get_autocast_dtype(device)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype), attn_mask, bias


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise MethodError(
            f"expected query, key and value of (batch, heads, length, width), found {shapes}"
        )
    heads, num_groups = query.shape[1], key.shape[1]
    shared = enable_gqa and num_groups > 0 and heads % num_groups == 0
    if key.shape[:3] != value.shape[:3] or (
        query.shape[0],
        query.shape[3],
    ) != (key.shape[0], key.shape[3]):
        raise MethodError(
            "expected query [B, H, N, D], key [B, K, M, D] and value [B, K, M, E], found "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if heads != num_groups and not shared:
        raise MethodError(
            f"expected as many key/value heads as query heads, or with enable_gqa a divisor of them, found "
            f"{num_groups} for {heads} (enable_gqa={enable_gqa})"
        )
    if not query.is_floating_point() or not (query.dtype == key.dtype == value.dtype):
        raise MethodError(
            f"expected floating-point query, key and value of one dtype, found {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )


def _check_options(dropout_p: float, query_chunk: int, key_chunk: int, backend: str) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise MethodError(f"expected dropout_p in [0, 1], found {dropout_p}")
    if query_chunk < 1 or key_chunk < 1:
        raise MethodError(
            f"expected chunks of at least one query and one key, found {query_chunk} and {key_chunk}"
        )
    if backend not in ("auto", "chunked", "torch"):
        raise MethodError(f"expected backend 'auto', 'chunked' or 'torch', found {backend!r}")
