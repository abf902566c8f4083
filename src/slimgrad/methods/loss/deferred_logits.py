"""Logits that are not computed until something needs them: a stand-in for a linear layer's output.

``DeferredLogits`` is a ``torch.Tensor`` with shape, dtype, device and ``requires_grad``, but no storage. The
steps that models put between their head and their loss (``deferred_steps``) give another stand-in; a
cross-entropy with class targets takes the loss from hidden states and weight, chunk by chunk; every other
operation first computes the real logits, once, with the operations a plain model would have run, and goes on
with them. So an operation unknown here costs the memory it always cost, and is never wrong.

Reading the logits after the head's weight was updated raises ``UnsupportedError``: they were never computed,
and the weight that made them is gone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor

from slimgrad.errors import UnsupportedError
from slimgrad.methods.loss.linear_cross_entropy import Backend
from slimgrad.methods.loss.pending_logits import Origin, Outcome, Pending


class DeferredLogits(Tensor):
    """A tensor of logits without storage; made by ``defer`` and by the steps it understands."""

    pending: Pending

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer from what is known, or compute the logits and call ``func`` on them."""
        from slimgrad.methods.loss.deferred_steps import answer

        kwargs = kwargs or {}
        found = answer(func, args, kwargs)
        if found is not NotImplemented:
            return found
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
        real_args, real_kwargs = _computed((args, kwargs), name)
        return func(*real_args, **real_kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """For C++ code that passed ``__torch_function__`` by: values here, gradients through ``_Stand``."""
        if func._schema.is_mutable:
            raise UnsupportedError(
                f"{func} changes deferred logits in place, from code that hides it from Python: "
                "expected an out-of-place operation; detach the chunked loss for this model"
            )
        real_args, real_kwargs = _computed((args, kwargs or {}), str(func), detach=True)
        return func(*real_args, **real_kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """The geometry; computes nothing."""
        shape_only = self.pending.shape_only
        return (
            f"DeferredLogits(shape={tuple(shape_only.shape)}, dtype={shape_only.dtype}, "
            f"device='{self.pending.hidden.device}', computed={self.pending.is_computed})"
        )


def _computed(tree: Any, needed_by: str, detach: bool = False) -> Any:
    """``tree`` of lists, tuples and dicts with real logits for stand-ins."""

    def swap(leaf: Any) -> Any:
        if not isinstance(leaf, DeferredLogits):
            return leaf
        real = leaf.pending.materialise(needed_by)
        return real.detach() if detach else real

    return torch.utils._pytree.tree_map(swap, tree)


class _Stand(torch.autograd.Function):
    """Ties a stand-in to the graph, for C++ operations that take it for an ordinary tensor."""

    @staticmethod
    def forward(
        ctx: Any, pending: Pending, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.pending = pending
        return _without_storage(pending)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        pending: Pending = ctx.pending
        real = pending.materialise("backward")
        if not pending.backward_is_possible:
            raise UnsupportedError(
                "the logits were changed in place after an operation had read them: expected them unchanged until "
                "backward; use an out-of-place operation"
            )
        origin = pending.origin
        sources = (origin.hidden, origin.weight, origin.bias)
        wanted = [t for t in sources if t is not None and t.requires_grad]
        grads = torch.autograd.grad(
            real,
            wanted,
            grad_outputs[0],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        found = iter(grads)
        return (
            None,
            *(next(found) if t is not None and t.requires_grad else None for t in sources),
        )


def _without_storage(pending: Pending) -> DeferredLogits:
    geometry = pending.shape_only
    made: DeferredLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        DeferredLogits,
        geometry.shape,
        strides=geometry.stride(),
        storage_offset=geometry.storage_offset(),
        dtype=geometry.dtype,
        device=pending.hidden.device,
    )
    made.pending = pending
    return made


def stand_in(pending: Pending) -> DeferredLogits:
    """The tensor that stands for ``pending``."""
    if not pending.requires_grad:
        return _without_storage(pending)
    origin = pending.origin
    return _Stand.apply(pending, origin.hidden, origin.weight, origin.bias)  # type: ignore[no-any-return]


@contextmanager
def unseen() -> Generator[None]:
    """Run torch operations on meta tensors without any dispatch or function mode noticing."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        yield


def defer(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_size: int,
    backend: Backend = "slimgrad",
    outcome: Outcome | None = None,
) -> DeferredLogits:
    """A stand-in for ``linear(hidden, weight, bias)``; ``outcome`` is told what becomes of it.

    ``hidden`` is ``[..., D]``, ``weight`` ``[V, D]`` and ``bias`` ``[V]``, on one device and of dtypes that
    ``linear`` accepts.

    >>> logits = defer(torch.ones(2, 3), torch.ones(5, 3), chunk_size=1)
    >>> logits.shape, (logits * 2).sum().item()
    (torch.Size([2, 5]), 60.0)
    """
    shape = (*hidden.shape[:-1], weight.shape[0])
    outcome = Outcome(shape) if outcome is None else outcome
    origin = Origin(hidden, weight, bias, chunk_size, backend, outcome)
    with unseen():
        shape_only = torch.empty(shape, dtype=origin.logits_dtype, device="meta")
    return stand_in(Pending(origin, shape_only, hidden, bias, len(shape) - 1, origin.requires_grad))
