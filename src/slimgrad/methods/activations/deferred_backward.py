"""Images rendered patch by patch under a loss of the whole image: pixels, their gradients, then each patch again.

Formula: with I = assemble(I_1 ... I_n) the image of n patches, dL/dw = sum_i (dL/dI_i) (dI_i/dw). I is rendered without
    a graph, L and dL/dI from I alone; then each patch is rendered again with a graph, dL/dI_i its backward's start
Memory: activations fall from a + L to the larger of a/n + p and 2 p + L, with a what rendering the whole image saves, p
    the image's pixels and L what the loss saves. Time: one more rendering.
Exactness: exact: the whole image's gradient up to the rounding of a sum over patches, whatever the loss. Random
    numbers are those of a patch's first run; buffers that rendering changes count once.
Limits: what ``render`` reaches besides its arguments must have no graph of its own: give it as ``scene``, whose graph
    (a network that predicts it) is run backward once. Hooks on gradients fire once a patch. Only modules that are
    named, or that ``render`` is or belongs to, have their buffers looked after. In torch.distributed these average
    gradients with the last patch alone.
References: Zhang et al., ARF: Artistic Radiance Fields (2022, arXiv 2206.06360), deferred back-propagation; Zhang et al.
    (2025), PanSplat, two-step deferred backpropagation. *departs:* the field may be any nest of tensors and patches
    need not be of one size: how they become an image is the caller's ``assemble``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from slimgrad.errors import BatchError
from slimgrad.method import Paper, component
from slimgrad.methods.activations.replayed_calls import (
    Call,
    CutOff,
    Scale,
    backward_by_replay,
    joined,
    modules_of,
)
from slimgrad.types import Column, Exactness


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "PanSplat: 4K Panorama Synthesis with Feed-Forward Gaussian Splatting",
        "Cheng Zhang, Haofei Xu, Qianyi Wu, Camilo Cruz Gambardella, Dinh Phung, Jianfei Cai",
        2025,
        "2412.12096",
    ),
)
def deferred_backward(
    render: Callable[..., Any],
    patches: Sequence[Any],
    loss_fn: Callable[[Any], Tensor],
    scene: Any = None,
    *,
    assemble: Callable[[Sequence[Any]], Any] = joined,
    modules: Sequence[nn.Module] = (),
    scale: Scale | None = None,
) -> Tensor:
    """Forward and backward of ``loss_fn(assemble([render(patch) for patch in patches]))``; the loss, detached.

    A patch is whatever ``render`` takes: slices, rays, frames. With a ``scene`` (a nest of tensors) it is
    ``render(patch, scene)``. ``assemble`` is differentiable; by default patches are joined along their first
    dimension, as strips of rows are. ``modules`` are those that ``render`` runs, where it is not itself one.
    Gradients are added to ``.grad``; ``scale`` (``GradScaler.scale``) is applied to the loss for backward only.
    Raises ``BatchError`` without patches and ``LossError`` for a loss that is no scalar with a gradient.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> rows = [torch.eye(2)[:1], torch.eye(2)[1:]]
    >>> deferred_backward(lambda row: row @ w, rows, lambda image: image.prod())
    tensor(2.)
    >>> w.grad
    tensor([2., 1.])
    """
    if not len(patches):
        raise BatchError("there are no patches: give one or more")
    cut = CutOff((patches, scene))
    parts, whole = cut.leaves
    rest = () if scene is None else (whole,)
    used = (*modules_of(render), *modules)
    calls = [Call(functools.partial(render, part, *rest), used) for part in parts]
    loss = backward_by_replay(calls, lambda outputs: loss_fn(assemble(outputs)), scale)
    cut.give_back()
    return loss
