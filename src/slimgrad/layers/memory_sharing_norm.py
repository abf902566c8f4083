"""Norms that keep their output for backward, which the linear layer after them keeps anyway, and not their input.

Formula: y = z w + b, z = (x - mean) r, r = 1 / sqrt(var + eps) (RMSNorm: no mean, no b). Backward: z = (y - b) / w,
    u = g w, dx = r (u - mean(u) - z mean(u z)), dw = sum g z, db = sum g (RMSNorm: no mean(u)).
Memory: activations are one tensor fewer for each norm whose output another layer keeps (a linear layer: its input),
    two fewer where an RMSNorm is made of single operations, as in Hugging Face's models; r, one number a token,
    is kept. In float32, 13 % of all activations of MiniLM (8 x 64 tokens), 18 % of SmolLM2-135M's (1 x 64). Temporaries in backward: z and one more of its size. Time: a second look at the input for r.
Exactness: exact: outputs are the same bits, gradients the same up to rounding. z comes back from y where |b| <= 8 |w|
    and w is not near the dtype's smallest number; of other channels z itself is kept, a column a channel, so that no
    weight is divided by that would blow up rounding. In bfloat16, z has the rounding of y.
Limits: a norm whose output nobody else keeps (dropout or another norm follows) saves nothing, and costs a little where
    its input is kept by others too. Under autocast linear layers keep a copy in the lower precision, which is not
    shared. The next layer may not write into the norm's output. No second derivatives. On CUDA, the weights are looked
    at in each forward pass, for channels to keep. Models without any such norm raise ``UnsupportedError``. Norms that keep channels
    make storages that a trace on fakes does not see: attach no codes or plan to blocks with such norms.
References: Yang et al. (2024), memory-sharing backpropagation (MS-LayerNorm, MS-RMSNorm). *departs:* the paper merges w and b into
    the linear layers after the norm and trains without them; here weights stay as they are, and are divided out in
    backward: the model's function, its parameters and its checkpoints are what they were, and it also works where
    a residual branch reads the norm's output too (BERT), which merging does not allow. ReGELU2 and ReSiLU2, the
    paper's other half, are not here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from slimgrad.errors import UnsupportedError
from slimgrad.layers.replaced_forward import replace_forward
from slimgrad.measuring.fake import is_fake
from slimgrad.method import Paper, Undo, component
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness

_MOST_BIAS: Final = 8.0  # times the weight: three bits of z are lost at most
_PROBE_ROWS: Final = 4


@dataclass(frozen=True)
class _Norm:
    """What is needed to go back through a norm; ``eps`` None is the dtype's own."""

    num_dims: int
    eps: float | None
    is_centred: bool


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which norms are computed."""
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor, num_dims: int, dtype: torch.dtype) -> Tensor:
    """One row for each vector that is normalized, (N, D)."""
    return x.detach().reshape(-1, math.prod(x.shape[-num_dims:])).to(dtype)


def faint_channels(weight_D: Tensor, bias_D: Tensor | None) -> Tensor | None:
    """Indices of the channels whose z is not told by the output; None where there are none (fakes have none)."""
    if is_fake(weight_D):
        return None
    with _disable_current_modes():  # a real pass makes the storages, in order, that a fake one made
        size = weight_D.detach().flatten().abs()
        is_clear = size >= torch.finfo(weight_D.dtype).tiny * 2**10
        if bias_D is not None:
            is_clear &= bias_D.detach().flatten().abs() <= _MOST_BIAS * size
        faint_I = (~is_clear).nonzero().flatten()
    return faint_I.clone() if faint_I.numel() else None  # seen by who counts bytes


def _scales(x_ND: Tensor, norm: _Norm, eps: float) -> tuple[Tensor | None, Tensor]:
    """Mean (None for RMSNorm) and r of each row, (N, 1)."""
    if norm.is_centred:
        var_N1, mean_N1 = torch.var_mean(x_ND, -1, correction=0, keepdim=True)
        return mean_N1, (var_N1 + eps).rsqrt_()
    size_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return None, (size_N1.square_().div_(x_ND.shape[-1]) + eps).rsqrt_()


class _MemorySharing(torch.autograd.Function):
    """x, weight, bias -> y; ``plain`` computes y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: _Norm,
        plain: Callable[[Tensor], Tensor],
    ) -> Tensor:
        y = plain(x)
        wide = _wide(x.dtype)
        eps = torch.finfo(wide).eps if norm.eps is None else norm.eps
        x_ND = _rows(x, norm.num_dims, wide)
        mean_N1, r_N1 = _scales(x_ND, norm, eps)
        faint_I = None if weight is None else faint_channels(weight, bias)
        z_NI = None
        if faint_I is not None:
            z_NI = x_ND[:, faint_I]
            z_NI = (z_NI if mean_N1 is None else z_NI - mean_N1) * r_N1
        ctx.save_for_backward(y, weight, bias, r_N1, faint_I, z_NI)
        ctx.norm, ctx.dtype = norm, x.dtype
        return y

    @staticmethod
    @single_backward("memory_sharing_norm")
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grads
        y, weight, bias, r_N1, faint_I, z_NI = ctx.saved_tensors
        norm, dtype = ctx.norm, r_N1.dtype
        w_D, b_D = (None if t is None else t.flatten().to(dtype) for t in (weight, bias))
        g_ND = _rows(g, norm.num_dims, dtype)
        z_ND = _rows(y, norm.num_dims, dtype)
        if w_D is not None:
            z_ND = z_ND / w_D if b_D is None else (z_ND - b_D).div_(w_D)
            if faint_I is not None:
                z_ND[:, faint_I] = z_NI
        gz_ND = g_ND * z_ND
        dw_D = gz_ND.sum(0) if ctx.needs_input_grad[1] else None
        db_D = g_ND.sum(0) if ctx.needs_input_grad[2] else None
        dx_ND = (
            _input_gradient(g_ND, z_ND, gz_ND, w_D, r_N1, norm) if ctx.needs_input_grad[0] else None
        )
        return (
            None if dx_ND is None else dx_ND.view(y.shape).to(ctx.dtype),
            None if dw_D is None else dw_D.view(weight.shape).to(weight.dtype),
            None if db_D is None else db_D.view(bias.shape).to(bias.dtype),
            None,
            None,
        )


def _input_gradient(
    g_ND: Tensor, z_ND: Tensor, gz_ND: Tensor, w_D: Tensor | None, r_N1: Tensor, norm: _Norm
) -> Tensor:
    """r (u - mean(u) - z mean(u z)), u = g w; writes over ``gz_ND``."""
    width = g_ND.shape[-1]
    w_D1 = g_ND.new_ones(width, 1) if w_D is None else w_D[:, None]
    along_N1 = gz_ND @ w_D1 / width
    dx_ND = torch.mul(g_ND, w_D1.T, out=gz_ND)
    if norm.is_centred:
        dx_ND.sub_(g_ND @ w_D1 / width)
    return dx_ND.addcmul_(z_ND, along_N1, value=-1).mul_(r_N1)


def _described(module: nn.Module) -> _Norm | None:
    """The norm that a module is, None if it is none of those known."""
    forward = type(module).forward
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return _Norm(len(module.normalized_shape), module.eps, True)
    if isinstance(module, nn.RMSNorm) and forward is nn.RMSNorm.forward:
        return _Norm(len(module.normalized_shape), module.eps, False)
    return _Norm(1, module.variance_epsilon, False) if _is_llama_norm(module) else None  # pyright: ignore[reportArgumentType]


def _is_llama_norm(module: nn.Module) -> bool:
    """By value: classes of that form are many, and some scale by 1 + weight."""
    parameters, eps = list(module.parameters()), getattr(module, "variance_epsilon", None)
    weight: Any = getattr(module, "weight", None)
    if (
        not isinstance(eps, float)
        or len(parameters) != 1
        or weight is not parameters[0]
        or weight.dim() != 1
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, weight.numel(), generator=generator).to(weight)
    with torch.no_grad():
        found = module(x)
        expected = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    rounding = 16 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    return found.shape == x.shape and torch.allclose(found, expected, rtol=rounding, atol=rounding)


def _run(norm: _Norm, module: Any, x: Tensor) -> Tensor:
    plain: Callable[..., Tensor] = functools.partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return plain(x)
    apply: Any = _MemorySharing.apply
    return apply(x, module.weight, getattr(module, "bias", None), norm, plain)


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation",
        "Yuchen Yang, Yingdong Shi, Cheems Wang, Xiantong Zhen, Yuxuan Shi, Jun Xu",
        2024,
        "2406.16282",
    ),
)
def memory_sharing_norm(model: nn.Module) -> Undo:
    """Let every ``nn.LayerNorm``, ``nn.RMSNorm`` and Llama-like RMSNorm of ``model`` share what it keeps, in place.

    Parameters and their names stay. Raises UnsupportedError where there is no such norm, or where one has been
    changed already.
    """
    undo, found = Undo(), False
    for module in model.modules():
        norm = _described(module)
        if norm is not None:
            found = True
            try:
                undo.then(replace_forward(module, _forward_of(norm)))
            except UnsupportedError:
                undo()
                raise
    if not found:
        raise UnsupportedError(
            f"expected a model with LayerNorm or RMSNorm layers, found none in {type(model).__name__}"
        )
    return undo


def _forward_of(norm: _Norm) -> Callable[..., Tensor]:
    def forward(self_: nn.Module, x: Tensor) -> Tensor:
        return _run(norm, self_, x)

    return forward
