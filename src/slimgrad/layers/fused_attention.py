"""Whether torch's ``scaled_dot_product_attention`` runs a fused kernel for given arguments, and holds no scores."""

from __future__ import annotations

import torch
from torch import Tensor


def torch_is_lean(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Whether torch takes these arguments and makes no tensor of queries times keys for them.

    ``mask`` (boolean) and ``bias`` are four-dimensional. On the CPU this states the conditions of torch's kernel,
    which ``torch._fused_sdp_choice`` does not tell of fake tensors; on CUDA torch is asked.
    """
    if mask is not None and (bias is not None or is_causal):
        return False
    if bias is not None and (is_causal or bias.dtype != query.dtype):
        return False
    if mask is not None and mask.shape[2] > 1 and mask.shape[3] > 1:
        return False  # it would be made a floating-point mask of that size, and kept
    added = bias if mask is None else mask
    if query.device.type == "cuda":
        return _cuda_is_fused(query, key, value, added, dropout_p, is_causal, enable_gqa)
    if query.device.type != "cpu" or not torch.backends.cuda.flash_sdp_enabled():
        return False
    bias_needs_gradient = bias is not None and bias.requires_grad
    sizes = (query.shape[2], key.shape[2], query.shape[3])
    return (
        not dropout_p
        and not bias_needs_gradient
        and query.shape[3] == value.shape[3]
        and min(sizes) > 0
        and all(t.stride(-1) == 1 for t in (query, key, value))
    )


def _cuda_is_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    cuda = torch.backends.cuda
    given = cuda.SDPAParams(query, key, value, added, dropout_p, is_causal, enable_gqa)
    return (
        (cuda.flash_sdp_enabled() and cuda.can_use_flash_attention(given))
        or (cuda.mem_efficient_sdp_enabled() and cuda.can_use_efficient_attention(given))
        or (cuda.cudnn_sdp_enabled() and cuda.can_use_cudnn_attention(given))
    )
