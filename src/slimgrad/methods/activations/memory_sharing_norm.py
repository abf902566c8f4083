"""Norms that keep their output for backward, which the linear layer after them keeps anyway, and not their input.

Formula: y = z w + b, z = (x - mean) r, r = 1 / sqrt(var + eps) (RMSNorm: no mean, no b). Backward: z = (y - b) / w,
    u = g w, dx = r (u - mean(u) - z mean(u z)), dw = sum g z, db = sum g (RMSNorm: no mean(u)).
Memory: activations are one tensor fewer for each norm whose output another layer keeps (a linear layer: its input),
    two fewer where an RMSNorm is made of single operations, as in Hugging Face's models; r, one number a token,
    is kept. In float32, 13 % of all activations of MiniLM (8 x 64 tokens), 18 % of SmolLM2-135M's (1 x 64). Temporaries
    in backward: z and one more of its size. Time: z and its products with r in backward; of an RMSNorm, also a second
    look at the input for r.
Exactness: exact: outputs are the same bits, gradients the same up to rounding. z comes back from y where |b| <= 8 |w|
    and w is not near the dtype's smallest number; of other channels z itself is kept, a column a channel, so that no
    weight is divided by that would blow up rounding. In bfloat16, z has the rounding of y.
Limits: refused where the model has no such norm, or where what the step keeps falls by less than a hundredth of its
    peak: a norm whose output nobody else keeps (dropout or another norm follows) saves nothing. Under autocast linear
    layers keep a copy in the lower precision, which is not shared. The next layer may not write into the norm's
    output. No second derivatives. Within compiled code norms are plain, and codes of saved tensors are not offered for
    rewritten blocks: what they do to the gradient was measured on plain ones. Columns are those of the weights
    at each forward pass; a plan counts with as many as there were when it was made. On CUDA, the weights are looked at
    in each forward pass, for channels to keep.
References: Yang et al. (2024), memory-sharing backpropagation (MS-LayerNorm, MS-RMSNorm). *departs:* the paper merges w and b into
    the linear layers after the norm and trains without them; here weights stay as they are, and are divided out in
    backward: the model's function, its parameters and its checkpoints are what they were, and it also works where
    a residual branch reads the norm's output too (BERT), which merging does not allow. ReGELU2 and ReSiLU2, the
    paper's other half, are ``approx_bp``.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from slimgrad.errors import UnsupportedError
from slimgrad.host import Host
from slimgrad.measuring.fake import is_fake
from slimgrad.method import Block, Method, Offer, Paper, Refusal, Scope, Undo
from slimgrad.replaced_forward import replace_forward
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness

_MOST_BIAS: Final = 8.0  # times the weight: three bits of z are lost at most
_PROBE_ROWS: Final = 4


@dataclass(frozen=True)
class _Norm:
    """What is needed to go back through a norm; ``eps`` None is the dtype's own.

    ``num_faint`` is how many channels keep a column where weights have no values to be looked at.
    """

    num_dims: int
    eps: float | None
    is_centred: bool
    num_faint: int = 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which norms are computed."""
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor, num_dims: int, dtype: torch.dtype) -> Tensor:
    """One row for each vector that is normalized, (N, D)."""
    return x.reshape(-1, math.prod(x.shape[-num_dims:])).to(dtype)


def faint_channels(weight_D: Tensor, bias_D: Tensor | None, num_on_fakes: int = 0) -> Tensor:
    """Indices (int64) of the channels whose z is not told by the output; of fake weights as many as are said.

    No dispatch mode sees how they are found: whatever the weights, a tape and a trace see the same operations.
    """
    with _disable_current_modes():
        if is_fake(weight_D):
            return weight_D.new_empty(num_on_fakes, dtype=torch.int64)
        size = weight_D.detach().flatten().abs()
        is_clear = size >= torch.finfo(weight_D.dtype).tiny * 2**10
        if bias_D is not None:
            is_clear &= bias_D.detach().flatten().abs() <= _MOST_BIAS * size
        return (~is_clear).nonzero().flatten()


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: _Norm, plain: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y; x as rows; mean (None for RMSNorm) and r of each row, (N, 1)."""
    wide = _wide(x.dtype)
    eps = torch.finfo(wide).eps if norm.eps is None else norm.eps
    if norm.is_centred and not torch.is_autocast_enabled(x.device.type):
        shape = x.shape[-norm.num_dims :]
        y, mean, r = torch.native_layer_norm(x, shape, weight, bias, eps)
        x_ND = _rows(x, norm.num_dims, wide)
        return y, x_ND, mean.view(-1, 1).to(wide), r.view(-1, 1).to(wide)
    y, x_ND = plain(x), _rows(x, norm.num_dims, wide)
    if norm.is_centred:
        var_N1, mean_N1 = torch.var_mean(x_ND, -1, correction=0, keepdim=True)
        return y, x_ND, mean_N1, (var_N1 + eps).rsqrt_()
    size_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return y, x_ND, None, (size_N1.square_().div_(x_ND.shape[-1]) + eps).rsqrt_()


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
        y, x_ND, mean_N1, r_N1 = _forward(x, weight, bias, norm, plain)
        faint_I = z_NI = None
        if weight is not None:  # also where no channel is faint: the operations are always the same
            faint_I = faint_channels(weight, bias, norm.num_faint)
            z_NI = x_ND.index_select(1, faint_I)
            z_NI = (z_NI if mean_N1 is None else z_NI.sub_(mean_N1)).mul_(r_N1)
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
            z_ND.index_copy_(1, faint_I, z_NI)
        needed = list(ctx.needs_input_grad[:3])
        through = _through_layer_norm if norm.is_centred else _through_rms_norm
        dx_ND, dw_D, db_D = through(g_ND, z_ND, (w_D, b_D), r_N1, needed)
        return (
            None if dx_ND is None else dx_ND.view(y.shape).to(ctx.dtype),
            None if dw_D is None else dw_D.view(weight.shape).to(weight.dtype),
            None if db_D is None else db_D.view(bias.shape).to(bias.dtype),
            None,
            None,
        )


_Weights = tuple[Tensor | None, Tensor | None]
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _through_layer_norm(
    g_ND: Tensor, z_ND: Tensor, weights: _Weights, r_N1: Tensor, needed: list[bool]
) -> _Gradients:
    """r (u - mean(u) - z mean(u z)), sum g z, sum g: PyTorch's own kernel, z being an input that is normalized."""
    zero_N1, one_N1, shape = torch.zeros_like(r_N1), torch.ones_like(r_N1), [z_ND.shape[-1]]
    dx_ND, dw_D, db_D = torch.ops.aten.native_layer_norm_backward(
        g_ND, z_ND, shape, zero_N1, one_N1, *weights, needed
    )
    dx_ND = dx_ND.mul_(r_N1) if needed[0] else None
    return dx_ND, dw_D if needed[1] else None, db_D if needed[2] else None


def _through_rms_norm(
    g_ND: Tensor, z_ND: Tensor, weights: _Weights, r_N1: Tensor, needed: list[bool]
) -> _Gradients:
    """r (u - z mean(u z)), sum g z."""
    (w_D, _), width = weights, g_ND.shape[-1]
    gz_ND = g_ND * z_ND
    dw_D = gz_ND.sum(0) if needed[1] else None
    if not needed[0]:
        return None, dw_D, None
    w_D1 = g_ND.new_ones(width, 1) if w_D is None else w_D[:, None]
    along_N1 = gz_ND @ w_D1 / width
    dx_ND = torch.mul(g_ND, w_D1.T, out=gz_ND)
    return dx_ND.addcmul_(z_ND, along_N1, value=-1).mul_(r_N1), dw_D, None


def _described(module: nn.Module) -> _Norm | None:
    """The norm that a module is, None if it is none of those known."""
    forward = type(module).forward
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return _Norm(len(module.normalized_shape), module.eps, True)
    if isinstance(module, nn.RMSNorm) and forward is nn.RMSNorm.forward:
        return _Norm(len(module.normalized_shape), module.eps, False)
    return _Norm(1, module.variance_epsilon, False) if _is_llama_norm(module) else None  # pyright: ignore[reportArgumentType]


def _is_llama_norm(module: nn.Module) -> bool:
    """By value, on weights of its own: classes of that form are many, and some scale by 1 + weight."""
    parameters, eps = list(module.parameters()), getattr(module, "variance_epsilon", None)
    weight: Any = getattr(module, "weight", None)
    if (
        not isinstance(eps, float)
        or len(parameters) != 1
        or weight is not parameters[0]
        or weight.dim() != 1
    ):
        return False
    generator, dtype = torch.Generator().manual_seed(0), weight.dtype
    x, w_D = (
        torch.randn(*rows, weight.numel(), generator=generator).to(dtype)
        for rows in ((_PROBE_ROWS,), ())
    )
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(w_D)}
    try:
        with torch.no_grad():
            found = type(module).forward(probe, x)
    except Exception:
        return False  # it is another kind of module
    expected = w_D * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    rounding = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return found.shape == x.shape and torch.allclose(found, expected, rtol=rounding, atol=rounding)


def _norms(model: nn.Module) -> list[tuple[nn.Module, _Norm]]:
    described = ((module, _described(module)) for module in model.modules())
    return [(module, norm) for module, norm in described if norm is not None]


def _share(norms: Sequence[tuple[nn.Module, _Norm]]) -> Undo:
    undo = Undo()
    for module, norm in norms:
        try:
            undo.then(replace_forward(module, _forward_of(module, norm)))
        except UnsupportedError:
            undo()
            raise
    return undo


def _forward_of(module: nn.Module, norm: _Norm) -> Callable[..., Tensor]:
    weight: Any = module.weight
    if weight is not None and not is_fake(weight):
        faint_I = faint_channels(weight, getattr(module, "bias", None))
        norm = replace(norm, num_faint=faint_I.numel())

    def forward(self_: nn.Module, x: Tensor) -> Tensor:
        return _run(norm, self_, x)

    return forward


def _run(norm: _Norm, module: Any, x: Tensor) -> Tensor:
    plain: Callable[..., Tensor] = functools.partial(type(module).forward, module)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return plain(x)
    apply: Any = _MemorySharing.apply
    return apply(x, module.weight, getattr(module, "bias", None), norm, plain)


def memory_sharing_norm(model: nn.Module) -> Undo:
    """Let every ``nn.LayerNorm``, ``nn.RMSNorm`` and Llama-like RMSNorm of ``model`` share what it keeps, in place.

    For use by hand, without a plan. Parameters and their names stay. Raises UnsupportedError where there is no such
    norm, or where one has been changed already.
    """
    norms = _norms(model)
    if not norms:
        raise UnsupportedError(
            f"expected a model with LayerNorm or RMSNorm layers, found none in {type(model).__name__}"
        )
    return _share(norms)


@dataclass(frozen=True)
class MemorySharingNorm:
    """No hyperparameters: every norm of the model whose forward pass is that of its class."""

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.MODEL
    is_refinement: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation",
        "Yuchen Yang, Yingdong Shi, Cheems Wang, Xiantong Zhen, Yuxuan Shi, Jun Xu",
        2024,
        "2406.16282",
    )

    @classmethod
    def settings(cls, host: Host, batch: Any) -> Sequence[Method] | Refusal:
        """One, where the model has a norm."""
        if not _plain_norms(host.model):
            return Refusal(
                "the model has no LayerNorm or RMSNorm with the forward pass of its class"
            )
        return [cls()]

    def offer(self, block: Block) -> Offer | Refusal:
        """The measured step already runs with such norms."""
        return Offer(block.model_record, "norms keep their output in place of their input")

    def attach(self, block: Block) -> Undo:
        """Replace the forward pass of each norm; raises UnsupportedError where there is none."""
        norms = _plain_norms(block.live.model)
        if not norms:
            raise UnsupportedError(
                "expected a model with LayerNorm or RMSNorm layers whose forward pass is that of their class, "
                f"found none in {type(block.live.model).__name__}"
            )
        return _share(norms)


def _plain_norms(model: nn.Module) -> list[tuple[nn.Module, _Norm]]:
    return [(module, norm) for module, norm in _norms(model) if "forward" not in module.__dict__]
