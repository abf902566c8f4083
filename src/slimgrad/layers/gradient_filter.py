"""Convolutions that go back on a coarser grid: output gradients averaged over patches, and pooled inputs kept.

Formula: y = conv(x, W) as it is. Kept: X = the means of x over patches of r x r. Backward: G = the means of g over
    patches of r x r; dW = sum over places and pixels of the patch map G with the patch map X, dx = the patch means of
    conv^T(G, W), one value a patch: both are convolutions on the coarse grid with the kernel V_d = sum_k n_kd W_k,
    n_kd counting the pixels of a patch that offset k of the kernel leads d patches away. db = sum g.
Memory: activations are the input's over r^2 (edges rounded up to whole patches). Temporaries in backward are of the coarse
    grid, but for dx. Time: backward has at most r^2 fewer products, and at least the coarse kernel's; 3x3 at r = 2 has
    4 times fewer. Forward is as it was, and one pooling. The small net below is not faster for it, on one CPU core.
Exactness: approximate: what varies inside a patch is lost, in g and in x. r = 1 is autograd's up to rounding, whatever
    stride, padding, dilation and groups. ``gradient_cosines`` measures it. Digits of 16x16 pixels, three 3x3
    convolutions with batch norm, r = 2: cosines of their weights between 0.43 and 0.89 while they train, 97.7 % held
    out against 98.4 % of exact training; with one mean over all places before the head, 94.8 % against 97.4 %.
Limits: ``nn.Conv2d`` with padding with zeros; other convolutions, and models without any that is chosen, raise
    ``UnsupportedError``. Errors grow with the number of filtered layers in a row: name the last ones, as the paper
    trains them. No second derivatives.
References: Yang et al. (2023), the gradient filter, and its authors' convolution (radius). *departs:* the paper adds a patch's whole kernel up (one product a patch, the same
    gradient for every weight of a kernel), which at r = 1 is not the gradient; here patches beside it are counted for
    what they overlap, nine products a patch for a 3x3 kernel. Patches of the input are r x r under strides too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.method import Paper, Undo, component
from slimgrad.replaced_forward import layers_named, replace_forward
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness

__all__ = ["gradient_cosines", "gradient_filter"]


# Shapes: N images, O and I channels of output and input, HW places, KL a kernel; capitals of the coarse grid are P.


def overlaps(
    size: int, stride: int, dilation: int, before: int, patch: int
) -> tuple[int, list[list[int]]]:
    """Along one dimension: the first coarse offset d, and n_kd for each offset k of the kernel."""
    places = [
        [(pixel * stride + k * dilation - before) // patch for pixel in range(patch)]
        for k in range(size)
    ]
    first, last = min(places[0]), max(places[-1])
    return first, [[row.count(d) for d in range(first, last + 1)] for row in places]


def pooled(x_NCHW: Tensor, patch: int) -> Tensor:
    """Means over patches; past the edges there are zeros."""
    if patch == 1:
        return x_NCHW
    return functional.avg_pool2d(x_NCHW, patch, ceil_mode=True, divisor_override=patch**2)


def _counts(conv: nn.Conv2d, patch: int, like: Tensor) -> tuple[tuple[int, int], list[Tensor]]:
    left, _, top, _ = conv._reversed_padding_repeated_twice
    found = [
        overlaps(k, s, d, before, patch)
        for k, s, d, before in zip(
            conv.kernel_size, conv.stride, conv.dilation, (top, left), strict=True
        )
    ]
    counts = [torch.tensor(n, dtype=like.dtype, device=like.device) for _, n in found]
    return (found[0][0], found[1][0]), counts


class _FilteredConvolution(torch.autograd.Function):
    """x_NIHW, weight_OIKL, bias_O -> y_NOHW; ``plain`` computes y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv: nn.Conv2d,
        patch: int,
        plain: Callable[[Tensor], Tensor],
    ) -> Tensor:
        y = plain(x)
        X = pooled(x.detach().to(y.dtype), patch) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(X, weight)
        ctx.conv, ctx.patch, ctx.shape, ctx.dtype = conv, patch, x.shape, x.dtype
        return y

    @staticmethod
    @single_backward("gradient_filter")
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grads
        X, weight = ctx.saved_tensors
        conv, patch, dx, dw = ctx.conv, ctx.patch, None, None
        wants_x, wants_w, wants_b = ctx.needs_input_grad[:3]
        db = g.sum((0, 2, 3)) if wants_b else None
        if wants_x or wants_w:
            first, counts = _counts(conv, patch, g)
            G = pooled(g, patch)
            V = torch.einsum("oikl,kp,lq->oipq", weight.to(g.dtype), *counts)
            size = tuple(math.ceil(n / patch) for n in ctx.shape[2:])
            dX, dV = _coarse_backward(
                conv, G, X, V, (ctx.shape[0], ctx.shape[1], *size), first, (wants_x, wants_w)
            )
            if dX is not None:
                dx = _spread(dX.div_(patch**2), patch, ctx.shape[2:]).to(ctx.dtype)
            if dV is not None:
                dw = torch.einsum("oipq,kp,lq->oikl", dV, *counts).to(weight.dtype)
        return dx, dw, db, None, None, None


def _coarse_backward(
    conv: nn.Conv2d,
    G: Tensor,
    X: Tensor | None,
    V: Tensor,
    shape: tuple[int, ...],
    first: tuple[int, int],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the coarse convolution whose offsets start at ``first``."""
    padding: list[int] = []  # width first, as functional.pad has it
    for dim in (1, 0):
        needed = (G.shape[2 + dim] - 1) * conv.stride[dim] + V.shape[2 + dim]
        padding += [-first[dim], needed + first[dim] - shape[2 + dim]]
    padded = functional.pad(G.new_zeros(1).expand(shape) if X is None else X, padding)
    dX, dV, _ = torch.ops.aten.convolution_backward(
        G,
        padded,
        V,
        None,
        list(conv.stride),
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        conv.groups,
        [*wanted, False],
    )
    return None if dX is None else functional.pad(dX, [-p for p in padding]), dV


def _spread(x_NCPQ: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Each value over its patch, cut at the edges."""
    if patch == 1:
        return x_NCPQ
    wide = x_NCPQ.repeat_interleave(patch, 2)[:, :, : size[0]]
    return wide.repeat_interleave(patch, 3)[..., : size[1]]


def _run(patch: int, conv: nn.Conv2d, x: Tensor) -> Tensor:
    plain: Callable[[Tensor], Tensor] = functools.partial(nn.Conv2d.forward, conv)
    if not torch.is_grad_enabled():
        return plain(x)
    if x.dim() == 3:
        return _run(patch, conv, x[None])[0]
    apply: Any = _FilteredConvolution.apply
    return apply(x, conv.weight, conv.bias, conv, patch, plain)


@component(
    Column.ACTIVATIONS,
    Exactness.APPROXIMATE,
    Paper(
        "Efficient On-device Training via Gradient Filtering",
        "Yuedong Yang, Guihong Li, Radu Marculescu",
        2023,
        "2301.00330",
    ),
)
def gradient_filter(
    model: nn.Module, patch: int = 2, *, layers: Collection[str] | None = None
) -> Undo:
    """Let convolutions of ``model`` go back on patches of ``patch`` x ``patch`` pixels, in place.

    ``layers`` are the paths of those to change, None all. Raises MethodError for a patch that is no whole number from 1
    on and for ``layers`` that are one string, UnsupportedError for a chosen layer that is no ``nn.Conv2d`` padded with
    zeros, or where there is none.
    """
    if type(patch) is not int or patch < 1:
        raise MethodError(f"expected patches of 1 or more whole pixels a side, found {patch}")
    undo = Undo()
    try:
        for conv in _chosen(model, layers).values():
            undo.then(replace_forward(conv, _forward_of(patch)))
    except UnsupportedError:
        undo()
        raise
    return undo


def _forward_of(patch: int) -> Callable[..., Tensor]:
    def forward(self_: nn.Conv2d, input: Tensor) -> Tensor:  # noqa: A002
        return _run(patch, self_, input)

    return forward


def _chosen(model: nn.Module, layers: Collection[str] | None) -> dict[str, nn.Conv2d]:
    modules = dict(model.named_modules())
    names = layers_named(layers, [n for n, m in modules.items() if isinstance(m, nn.Conv2d)])
    found: dict[str, nn.Conv2d] = {}
    for name in names:
        module = modules.get(name)
        is_plain = type(module).forward is nn.Conv2d.forward if module is not None else False
        if not isinstance(module, nn.Conv2d) or not is_plain or module.padding_mode != "zeros":
            raise UnsupportedError(
                f"expected an nn.Conv2d padded with zeros at {name!r}, found {module}"
            )
        found[name] = module
    if not found:
        raise UnsupportedError(
            f"expected a model with 2-d convolutions, found none in {type(model).__name__}"
        )
    return found


def gradient_cosines(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    patch: int = 2,
    *,
    layers: Collection[str] | None = None,
) -> Mapping[str, float]:
    """For each parameter with a gradient, the cosine of the filtered gradient with the exact one on ``batch``.

    ``loss_fn(model, batch)`` is run twice, and has to give the same loss; running statistics see the batch twice.
    """
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss_fn(model, batch), list(names.values()), allow_unused=True)

    exact = gradients()
    undo = gradient_filter(model, patch, layers=layers)
    try:
        found = gradients()
    finally:
        undo()
    return {
        name: float(functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
        for name, a, b in zip(names, found, exact, strict=True)
        if a is not None and b is not None
    }
