"""Seconds of single operations, timed on tensors of the traced shapes, within a limit of memory and time.

A step is never run for this: each *distinct* operation of a trace (function, shapes, strides, dtypes, other
arguments) is run alone. Operations too large for the memory limit get their seconds from the measured rates of
their own kind: FLOPs a second for matrix products, convolutions and attention, bytes a second for the rest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from slimgrad.measuring.randomness import kept_randomness
from slimgrad.measuring.stopwatch import OtherData, seconds_of


class TensorSpec(NamedTuple):
    """What an operation's tensor argument looked like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements from its first to its last in memory, holes included."""
        if not all(self.shape):
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


OpKey: TypeAlias = tuple[Any, Any]
"""A distinct operation: the function and its frozen arguments."""


def _freeze(value: Any) -> Any:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return TensorSpec(tuple(value.shape), tuple(strides), value.dtype, value.device.type)
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return ("dict", tuple((k, _freeze(v)) for k, v in value.items()))
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return value
    return repr(value)


def op_key(func: Any, args: Any, kwargs: Any) -> OpKey:
    """The distinct operation that this call is an instance of."""
    return (func, (_freeze(args), tuple((k, _freeze(v)) for k, v in kwargs.items())))


_VIEWS = frozenset(
    [
        "detach",
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "expand",
        "slice",
        "select",
        "permute",
        "unsqueeze",
        "squeeze",
        "alias",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "reshape",
        "_reshape_alias",
        "lift_fresh",
        "diagonal",
        "unfold",
        "view_as_real",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "_local_scalar_dense",
    ]
)


def _specs(key: OpKey) -> list[TensorSpec]:
    found: list[TensorSpec] = []

    def walk(value: Any) -> None:
        if isinstance(value, TensorSpec):
            found.append(value)
        elif isinstance(value, tuple):
            for member in value:
                walk(member)

    walk(key[1])
    return found


def coarsest(keys: Sequence[OpKey]) -> float:
    """The epsilon of the coarsest floating dtype among the operations' arguments."""
    dtypes = {spec.dtype for key in keys for spec in _specs(key)}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0)


def op_bytes(key: OpKey) -> int:
    """Bytes that an operation's tensor arguments span."""
    return sum(spec.nbytes for spec in _specs(key))


def built(value: Any) -> Any:
    """A frozen argument as a real one: tensors of the same shape, strides and dtype with values of no meaning."""
    if isinstance(value, TensorSpec):
        span = value.span
        if value.dtype.is_floating_point or value.dtype.is_complex:
            flat = torch.empty(span, dtype=value.dtype, device=value.device).uniform_(0.01, 1)
        else:
            flat = torch.zeros(span, dtype=value.dtype, device=value.device)
        return flat.as_strided(value.shape, value.stride)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        if len(value) == 2 and value[0] == "dict":
            return {k: built(v) for k, v in value[1]}
        return [built(v) for v in value]
    return value


def _allocated_bytes(key: OpKey) -> int:
    """Bytes that running an operation alone takes: its arguments and what it makes, both with holes."""
    given = sum(spec.span * spec.dtype.itemsize for spec in _specs(key))
    try:
        func, (args, kwargs) = key
        out = func(*[_meta(a) for a in args], **{k: _meta(v) for k, v in kwargs})
    except Exception:
        return 3 * given
    return given + sum(t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor))


def op_flops(key: OpKey) -> int:
    """Floating-point operations of a matrix product, convolution or attention; 0 for anything else.

    Formulas are those of torch's own FLOP counter.
    """
    func, (args, kwargs) = key
    packet = getattr(func, "overloadpacket", None)
    if "flash_attention_for_cpu" in str(packet):
        return _attention_flops(key)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    try:
        with torch.device("meta"):
            meta = lambda v: _meta(v)  # noqa: E731
            real_args, real_kwargs = [meta(a) for a in args], {k: meta(v) for k, v in kwargs}
            out = func(*real_args, **real_kwargs)
            return int(formula(*real_args, **real_kwargs, out_val=out))
    except Exception:
        return 0


def _meta(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    if isinstance(value, tuple):
        return [_meta(v) for v in value]
    return value


def _attention_flops(key: OpKey) -> int:
    q, k, *_ = [s for s in _specs(key) if len(s.shape) == 4]
    backward = "backward" in str(key[0])
    if backward:  # grad_out comes first
        _, q, k, *_ = [s for s in _specs(key) if len(s.shape) == 4]
    batch, heads, n, d = q.shape
    return int((5 if backward else 2) * 2 * batch * heads * n * k.shape[2] * d)


@dataclass
class Rates:
    """What this machine reached: used for operations too large to be timed, and told to the user."""

    flops_per_s: float = 5e10
    bytes_per_s: float = 5e9
    overhead_s: float = 3e-6


_INDEXED = frozenset(
    [
        "embedding",
        "embedding_dense_backward",
        "gather",
        "index_select",
        "index",
        "index_put",
        "index_put_",
        "masked_fill",
        "masked_fill_",
        "where",
        "nll_loss_forward",
        "nll_loss_backward",
        "scatter",
        "scatter_",
        "scatter_add",
        "scatter_add_",
        "max_pool2d_with_indices_backward",
        "_to_copy",
        "copy_",
        "clone",
        "add",
        "mul",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "bitwise_and",
        "bitwise_or",
        "logical_and",
        "logical_or",
        "logical_not",
        "any",
        "all",
        "cumsum",
        "arange",
        "full",
        "_linear_cross_entropy_batch_chunked",
    ]
)
_OPAQUE = frozenset({"workspace", "reserve", "philox_seed", "rng_state"})


def name_of(key: OpKey) -> str:
    """The operation's name without its overload: ``"mm"``."""
    return getattr(key[0], "__name__", "").split(".")[0]


def _may_be_run(key: OpKey) -> bool:
    """Whether an operation can be run on made-up values.

    Kernels trust opaque workspaces, lengths and offsets: wrong ones can crash the process. So integers are made
    up (as zeros) only for operations known to take them as indices or plain values.
    """
    schema = getattr(key[0], "_schema", None)
    if schema is None or any(a.name in _OPAQUE for a in schema.arguments):
        return False
    whole = all(s.dtype.is_floating_point or s.dtype.is_complex for s in _specs(key))
    return whole or name_of(key) in _INDEXED


def _time(key: OpKey, deadline: float, others: OtherData | None) -> float:
    """Seconds of an operation, on what is not in the cache where ``others`` takes it."""
    func, (args, kwargs) = key
    real_args = [built(a) for a in args]
    real_kwargs = {k: built(v) for k, v in kwargs}
    device = next((s.device for s in _specs(key)), "cpu")
    taken: list[float] = []
    for attempt in range(4):
        if others is not None:
            others.use()
        taken.append(seconds_of(lambda: func(*real_args, **real_kwargs), device))
        if attempt and (sum(taken) > 0.3 or time.perf_counter() > deadline):
            break
    return min(taken[1:] or taken)  # what others do on the machine only ever adds


def time_operations(
    keys: Sequence[OpKey], *, limit_bytes: int | None = None, limit_s: float = 20.0
) -> tuple[np.ndarray, Rates]:
    """Seconds of each distinct operation, and the rates found on the way.

    No operation that would take more than ``limit_bytes`` is run (its arguments and what it makes), and no more than about ``limit_s`` seconds are spent; what is left out is estimated from the rates.
    """
    seconds = np.full(len(keys), np.nan)
    flops = np.array([op_flops(key) for key in keys], dtype=np.float64)
    num_bytes = np.array([op_bytes(key) for key in keys], dtype=np.float64)
    deadline = time.perf_counter() + limit_s
    others: dict[str, OtherData] = {}
    with kept_randomness(), torch.no_grad():
        for index in np.argsort(-(num_bytes + flops / 10)):
            key = keys[int(index)]
            if name_of(key) in _VIEWS:
                seconds[index] = 2e-6
            elif not _may_be_run(key):
                continue
            elif time.perf_counter() < deadline and (
                limit_bytes is None or _allocated_bytes(key) <= limit_bytes
            ):
                try:
                    seconds[index] = _time(key, deadline, _others(key, limit_bytes, others))
                except Exception:
                    continue
    rates = _rates(seconds, flops, num_bytes)
    for index in np.flatnonzero(np.isnan(seconds)):
        seconds[index] = _estimate(int(index), keys, seconds, flops, num_bytes, rates)
    return seconds, rates


def _others(key: OpKey, limit_bytes: int | None, made: dict[str, OtherData]) -> OtherData | None:
    """What fills the cache of the operation's device, made once; None where there is no memory for it."""
    device = next((s.device for s in _specs(key)), "cpu")
    if limit_bytes is not None and _allocated_bytes(key) + OtherData.num_bytes > limit_bytes:
        made.pop(device, None)
        return None
    if device not in made:
        made[device] = OtherData(device)
    return made[device]


def _estimate(
    index: int,
    keys: Sequence[OpKey],
    seconds: np.ndarray,
    flops: np.ndarray,
    num_bytes: np.ndarray,
    rates: Rates,
) -> float:
    """Seconds of an operation that was not run: from others of its name, from its forward twin, or from rates."""
    name, size = name_of(keys[index]), flops if flops[index] > 0 else num_bytes
    same = [
        i for i, key in enumerate(keys) if name_of(key) == name and seconds[i] > 0 and size[i] > 0
    ]
    if same:
        nearest = min(same, key=lambda i: abs(np.log(size[i] / max(size[index], 1))))
        return float(seconds[nearest] * size[index] / size[nearest])
    forward = [
        seconds[i]
        for i, key in enumerate(keys)
        if name == f"{name_of(key)}_backward" and seconds[i] > 0
    ]
    if forward:
        return 2 * float(np.mean(forward))  # one product forward, two backward
    if flops[index] > 0:
        return rates.overhead_s + float(flops[index]) / rates.flops_per_s
    return rates.overhead_s + 2 * float(num_bytes[index]) / rates.bytes_per_s


def _rates(seconds: np.ndarray, flops: np.ndarray, num_bytes: np.ndarray) -> Rates:
    rates = Rates()
    timed = ~np.isnan(seconds)
    heavy = timed & (flops > 1e6)
    if heavy.any():
        rates.flops_per_s = float(flops[heavy].sum() / max(seconds[heavy].sum(), 1e-9))
    moving = timed & (flops == 0) & (num_bytes > 1e5) & (seconds > 5e-6)
    if moving.any():
        rates.bytes_per_s = float(2 * num_bytes[moving].sum() / max(seconds[moving].sum(), 1e-9))
    return rates
