"""Lay the weights of convolutions out with channels last, so that the step runs on kernels for that layout.

Formula: a weight W of shape (O, I, H, W) has strides (H W I, 1, W I, I) in place of (I H W, H W, W, 1): the same values at
    other places. A convolution whose weight has that layout gives its output in it, and what follows keeps it.
Memory: none is freed; temporaries where an operation that does not know the layout copies its input, else the same.
    Time: another set of kernels, faster on some machines and slower on others: counted only where real passes
    of this model on this machine showed it. Attaching copies each weight, its gradient and its state once.
Exactness: exact up to rounding: kernels for the layout sum in another order.
Limits: models without a 2-d or 3-d convolution are refused, and those whose weights have the layout already or
    share their memory with other tensors of the model. What else shares memory with a weight (its ``data``, a
    ``state_dict()`` that was kept) does not see later updates. Nothing of the batch is converted: the first
    convolution does that. Weights of one channel or of one place (depthwise, 1x1) look the same in both layouts.
References: Li et al., Optimizing Memory Efficiency for Deep Convolutional Neural Networks on GPUs, arXiv 1610.03618: which
    layout is fast depends on the layer and the machine, so it is measured. *departs:* one layout for the whole
    model, channels last, chosen by its measured seconds and not layer by layer; PyTorch's operators carry it on.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from slimgrad.host import Host
from slimgrad.method import Block, Method, Offer, Paper, Refusal, Scope, Undo
from slimgrad.types import Column, Exactness

_FORMATS: Mapping[int, torch.memory_format] = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class ChannelsLast:
    """No hyperparameters: the layout of every 2-d and 3-d convolution's weight."""

    column: ClassVar[Column] = Column.TEMPORARIES
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.MODEL
    paper: ClassVar[Paper] = Paper(
        "Optimizing Memory Efficiency for Deep Convolutional Neural Networks on GPUs",
        "Chao Li, Yi Yang, Min Feng, Srimat Chakradhar, Huiyang Zhou",
        2016,
        arxiv="1610.03618",
    )

    @classmethod
    def settings(cls, host: Host, batch: Any) -> Sequence[Method] | Refusal:
        """One, where a convolution's weight would get other strides."""
        weights = convolution_weights(host.model)
        if not weights:
            return Refusal("the model has no 2-d or 3-d convolution")
        if not _to_change(host.model):
            return Refusal(
                "the convolutions' weights have channels last already, or share their memory"
            )
        return [cls()]

    def offer(self, block: Block) -> Offer | Refusal:
        """The measured step already runs in that layout."""
        return Offer(block.model_record, "convolution weights with channels last")

    def attach(self, block: Block) -> Undo:
        """Give the weights the layout, and gradients and optimizer state that of their weights, then and later."""
        host = block.live
        before = [(weight, weight.stride()) for weight in _to_change(host.model)]
        weights = [weight for weight, _ in before]
        undo = Undo(lambda: _follow(weights, host.optimizer))
        for weight, stride in before:
            undo.then(lambda w=weight, s=stride: setattr(w, "data", _laid_out(w, s)))
            weight.data = _laid_out(weight, _strides(weight))
        _follow(weights, host.optimizer)
        if host.optimizer is not None:
            # state that is loaded has the strides of where it comes from
            loaded = functools.partial(_follow, weights)
            undo.then(host.optimizer.register_load_state_dict_post_hook(loaded).remove)
        return undo


def convolution_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the model's 2-d and 3-d convolutions, transposed ones among them, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, _ConvNd) else None
        if weight is None or isinstance(weight, UninitializedParameter):
            continue
        if weight.dim() in _FORMATS and weight.layout is torch.strided:
            found[id(weight)] = weight
    return list(found.values())


def _to_change(model: nn.Module) -> list[nn.Parameter]:
    """Those of them that are laid out otherwise now and have their memory for themselves."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    owners = Counter(
        t.untyped_storage()._cdata for t in tensors.values() if t.layout is torch.strided
    )
    return [
        w
        for w in convolution_weights(model)
        if not w.is_contiguous(memory_format=_FORMATS[w.dim()])
        and owners[w.untyped_storage()._cdata] == 1
        and w.untyped_storage().nbytes() == w.numel() * w.element_size()
    ]


def _strides(weight: Tensor) -> tuple[int, ...]:
    meta = torch.empty(weight.shape, device="meta", memory_format=_FORMATS[weight.dim()])
    return meta.stride()


def _laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """The tensor's elements at other places in memory: a copy, where they are not there already."""
    values = tensor.detach()
    if tuple(stride) == values.stride():
        return values
    return values.new_empty_strided(values.shape, stride).copy_(values)


def _follow(weights: Sequence[Tensor], optimizer: Optimizer | None) -> None:
    """Lay gradients and state out as their weights are: fused kernels take elements in the order of memory."""
    for weight in weights:
        if _is_like(weight.grad, weight):
            weight.grad = _laid_out(weight.grad, weight.stride())
        state: dict[str, Any] = optimizer.state.get(weight, {}) if optimizer is not None else {}
        for key, value in state.items():
            if _is_like(value, weight):  # not in place: what was loaded may be another's state too
                state[key] = _laid_out(value, weight.stride())


def _is_like(value: Any, weight: Tensor) -> TypeGuard[Tensor]:
    is_strided = isinstance(value, Tensor) and value.layout is torch.strided
    return is_strided and value.shape == weight.shape
