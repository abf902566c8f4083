"""What deferred logits understand without being computed: geometry, token moves, scaling, and the loss.

Every rule here takes a stand-in and the call, and answers with another stand-in, or with ``NotImplemented``:
then the logits are computed and the call is plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor
from torch.nn import functional

from slimgrad.errors import UnsupportedError
from slimgrad.methods.loss.deferred_logits import DeferredLogits, unseen
from slimgrad.methods.loss.token_moves import (
    Args,
    Kwargs,
    StepRule,
    index,
    next_stand_in,
    permute,
    reshape,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def answer(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The result of ``func(*args, **kwargs)`` if it can be had without the logits, else NotImplemented."""
    if func is functional.cross_entropy:
        return _cross_entropy(*args, **kwargs)
    if func in _OF_GRADIENT:
        _check_gradient_exists((args, kwargs))
    logits = args[0] if args else None
    if not isinstance(logits, DeferredLogits) or logits.pending.is_computed:
        return NotImplemented
    if func in _GEOMETRY:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    rule = _STEPS.get(func)
    if rule is None or any(isinstance(a, DeferredLogits) for a in (*args[1:], *kwargs.values())):
        return NotImplemented
    return rule(logits, func, args[1:], kwargs)


def _check_gradient_exists(tree: Any) -> None:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, DeferredLogits) and leaf.pending.origin.outcome.consumed:
            raise UnsupportedError(
                "the loss was taken without logits, so it has no gradient in them: expected hooks and retain_grad on "
                "the logits before the loss is taken; or detach the chunked loss"
            )


def _cross_entropy(
    input: Any,  # noqa: A002 - the name is torch's
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, DeferredLogits) or isinstance(target, DeferredLogits):
        return NotImplemented
    if weight is not None or size_average is not None or reduce is not None:
        return NotImplemented
    if reduction not in ("mean", "sum") or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented
    pending = input.pending
    shape = tuple(pending.shape_only.shape)
    class_dim = 0 if len(shape) == 1 else 1
    if pending.is_computed or pending.class_dim != class_dim or shape[class_dim] == 0:
        return NotImplemented
    tokens = shape[:class_dim] + shape[class_dim + 1 :]
    if target.dtype != torch.int64 or tuple(target.shape) != tokens:
        return NotImplemented
    if target.device != pending.hidden.device:
        return NotImplemented
    return pending.cross_entropy(target, ignore_index, label_smoothing, reduction)


def _convert(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    pending = logits.pending
    dtype = _asked_dtype(logits, func, args, kwargs)
    if dtype is None or dtype not in _FLOATS:
        return NotImplemented
    if dtype == pending.shape_only.dtype:
        return logits
    return next_stand_in(pending, lambda source: source.to(dtype))


def _asked_dtype(
    logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs
) -> torch.dtype | None:
    own = logits.pending.shape_only.dtype
    if func in _NAMED_DTYPES:
        return None if args or kwargs else _NAMED_DTYPES[func]
    if func is Tensor.type:
        is_dtype = len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs
        return args[0] if is_dtype else None
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
    except (TypeError, RuntimeError):
        return None
    if memory_format is not None or (device is not None and device != logits.pending.hidden.device):
        return None
    return own if dtype is None else dtype


def _contiguous(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    if args or kwargs:
        return NotImplemented
    if logits.pending.shape_only.is_contiguous():
        return logits
    return next_stand_in(logits.pending, lambda source: source.contiguous())


def _clone(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    if args or kwargs:
        return NotImplemented
    return next_stand_in(logits.pending, lambda source: source.clone())


def _detach(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    pending = logits.pending
    bias = None if pending.bias is None else pending.bias.detach()
    return next_stand_in(
        pending,
        lambda source: source.detach(),
        hidden=pending.hidden.detach(),
        bias=bias,
        requires_grad=False,
    )


def _multiply(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    factor = _number(logits, args, kwargs)
    if factor is None:
        return NotImplemented
    return _scaled(logits, lambda source: source * factor, float(factor))


def _divide(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    divisor = _number(logits, args, kwargs)
    if divisor is None:
        return NotImplemented
    return _scaled(logits, lambda source: source / divisor, 1.0 / float(divisor))


def _scaled(logits: DeferredLogits, step: Callable[[Tensor], Tensor], factor: float) -> Any:
    pending = logits.pending
    if pending.post is None:
        return next_stand_in(pending, step, pre=pending.pre * factor)
    return next_stand_in(pending, step, post=pending.post * factor)


def _number(logits: DeferredLogits, args: Args, kwargs: Kwargs) -> float | int | None:
    """The one operand, if it is a finite number other than zero that needs no gradient."""
    if len(args) != 1 or kwargs:
        return None
    (value,) = args
    if isinstance(value, Tensor):
        is_plain = type(value) is Tensor and not value.requires_grad and value.device.type != "meta"
        if not is_plain or value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return None
        own = logits.pending.shape_only
        if value.dim() > 0 and (value.dtype != own.dtype or value.dim() > own.dim()):
            return None  # it takes part in type promotion and broadcasting
        value = value.item()
    if type(value) not in (int, float) or value == 0 or not math.isfinite(value):
        return None
    return value


def _tanh(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    if args or kwargs or logits.pending.post is not None:
        return NotImplemented
    return next_stand_in(logits.pending, lambda source: source.tanh(), post=1.0)


def _add_bias(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A constant vector over classes: ``logits + final_logits_bias`` of the BART family."""
    pending = logits.pending
    geometry = pending.shape_only
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or pending.post is not None:
        return NotImplemented
    (added,) = args
    is_last = pending.class_dim == geometry.dim() - 1
    if not is_last or added.requires_grad or added.dtype != geometry.dtype or added.dim() < 1:
        return NotImplemented
    num_classes = geometry.shape[-1]
    if (
        added.numel() != num_classes
        or added.shape[-1] != num_classes
        or added.dim() > geometry.dim()
    ):
        return NotImplemented
    if added.device != pending.hidden.device or pending.origin.logits_dtype != geometry.dtype:
        return NotImplemented
    kept_V = added.detach().reshape(-1).clone()  # it may change in place before it is used
    own_V = kept_V / pending.pre
    bias_V = own_V if pending.bias is None else pending.bias + own_V
    with unseen():
        meta_V = torch.empty_like(kept_V, device="meta")
    return next_stand_in(
        pending, lambda source: source + (meta_V if source.is_meta else kept_V), bias=bias_V
    )


_T = Tensor
_GEOMETRY = {
    *(getattr(_T, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "stride")),
    *(getattr(_T, name) for name in ("is_contiguous", "storage_offset", "element_size")),
    *(getattr(_T, name) for name in ("get_device", "is_floating_point", "is_complex", "__len__")),
    *(getattr(_T, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout")),
    *(getattr(_T, name).__get__ for name in ("requires_grad", "is_leaf", "is_cuda", "is_cpu")),
    *(getattr(_T, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "itemsize")),
    *(getattr(_T, name).__get__ for name in ("is_mps", "is_xpu", "is_nested", "nbytes")),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
}
_OF_GRADIENT = {
    torch.autograd.grad,
    _T.retain_grad,
    _T.register_hook,
}
_NAMED_DTYPES = {
    _T.float: torch.float32,
    _T.double: torch.float64,
    _T.half: torch.float16,
    _T.bfloat16: torch.bfloat16,
}


def _both(*names: str) -> list[Any]:
    return [getattr(place, n) for n in names for place in (torch, _T) if hasattr(place, n)]


_RULES: list[tuple[list[Any], StepRule]] = [
    ([_T.view, *_both("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")], reshape),
    (_both("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t"), permute),
    ([getattr(_T, name).__get__ for name in ("mT", "T")], permute),
    ([_T.__getitem__], index),
    ([*_NAMED_DTYPES, _T.to, _T.type], _convert),
    ([_T.contiguous], _contiguous),
    (_both("clone"), _clone),
    (_both("detach"), _detach),
    ([*_both("mul", "multiply"), _T.__mul__, _T.__rmul__], _multiply),
    ([*_both("div", "divide", "true_divide"), _T.__truediv__], _divide),
    (_both("tanh"), _tanh),
    ([*_both("add"), _T.__add__, _T.__radd__], _add_bias),
]
_STEPS: dict[Any, StepRule] = {func: rule for funcs, rule in _RULES for func in funcs}
