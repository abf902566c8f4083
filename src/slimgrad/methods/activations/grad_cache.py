"""Contrastive batches of any size: embeddings without a graph, the loss's gradient on them, then chunk by chunk again.

Formula: with E = (E_1 ... E_n) the embeddings of n chunks, dL/dw = sum_i (dL/dE_i) (dE_i/dw). E is computed without a
    graph, L and dL/dE from E alone; then each chunk is embedded again with a graph and dL/dE_i is its backward's start
Memory: activations of B samples fall from B a + L to the larger of c a + e B and 2 e B + L, with c the chunk size, a
    what the encoder saves for one sample, e one embedding and L what the loss saves (its B x B similarities).
    Time: one more forward pass of the encoders.
Exactness: exact: the full batch's gradient up to the rounding of a sum over chunks, where samples do not see each
    other inside the encoder. Each chunk's dropout masks are those of its first run; they are not the full batch's.
    Autocast is that of the caller; buffers that a forward pass changes count once, as do hooks that only look.
Limits: batch norm in training mode is refused where there is more than one chunk: its statistics would span a chunk, not
    the batch. Hooks on gradients fire once a chunk, so updates during backward do not go with it. Generators that a
    module owns are not replayed. ``loss_fn`` must not reach the encoders. In torch.distributed, gradients are averaged
    in the backward of the last chunk alone; negatives from all processes come in by
    ``gathering.gather_rows`` inside ``loss_fn``, whose average over processes is then the loss of all.
References: Gao, Zhang, Han and Callan (2021), section 3.3, steps 1 to 3, and 3.4 for several devices. *departs:* the
    backward of a chunk starts from the cached gradient itself, not from the product of both; the loss's own
    parameters (a temperature) get their gradient in step 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slimgrad.batches import batch_size, narrow
from slimgrad.errors import ArgumentError, BatchError, MethodError, UnsupportedError
from slimgrad.method import Paper, component
from slimgrad.methods.activations.replayed_calls import (
    Call,
    CutOff,
    Scale,
    backward_by_replay,
    joined,
)
from slimgrad.methods.gradients.micro_batches import has_batch_statistics
from slimgrad.types import Column, Exactness

Embed = Callable[[Any, Any], Any]
"""``embed(encoder, chunk)``: the embeddings of a chunk of inputs, one row a sample: a tensor or a nest of them."""


def call_encoder(encoder: nn.Module, chunk: Any) -> Tensor:
    """``encoder(chunk)``, a mapping given as keywords and a tuple or list as arguments; it must return a tensor."""
    if isinstance(chunk, Mapping):
        made = encoder(**chunk)
    else:
        made = encoder(*chunk) if isinstance(chunk, (tuple, list)) else encoder(chunk)
    if not isinstance(made, Tensor):
        raise ArgumentError(
            f"expected the encoder to return a tensor, found {type(made).__name__}: give GradCache "
            "embed=lambda encoder, chunk: ..., which takes the embeddings from it"
        )
    return made


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        "Luyu Gao, Yunyi Zhang, Jiawei Han, Jamie Callan",
        2021,
        "2101.06983",
    ),
)
class GradCache:
    """``loss = GradCache(encoder, loss_fn, chunk_size=16)(queries, passages)``: forward and backward of one batch.

    ``encoders`` is one module for all inputs or one for each; ``loss_fn(*embeddings)`` is a scalar of all rows.
    Inputs are tensors, or dicts, tuples or dataclasses of tensors, with samples along the first dimension; the
    number of samples may differ from input to input, and so may the ``chunk_size`` (a sequence, one for each).
    ``embed(encoder, chunk)`` returns the embeddings, ``call_encoder`` if it is not given.

    Gradients are added to ``.grad`` and the loss comes back detached; ``scale`` (``GradScaler.scale``) is applied
    to the loss for backward only. Raises ``MethodError`` for a chunk size below 1, ``ArgumentError`` where encoders
    and inputs do not go together, ``BatchError`` for an input without a number of samples, and ``UnsupportedError``
    for batch norm in training mode.
    """

    def __init__(
        self,
        encoders: nn.Module | Sequence[nn.Module],
        loss_fn: Callable[..., Tensor],
        chunk_size: int | Sequence[int] = 16,
        *,
        embed: Embed = call_encoder,
        scale: Scale | None = None,
    ) -> None:
        self.encoders = encoders if isinstance(encoders, nn.Module) else tuple(encoders)
        self.loss_fn = loss_fn
        self.chunk_size = chunk_size if isinstance(chunk_size, int) else tuple(chunk_size)
        self.embed, self.scale = embed, scale
        sizes = (self.chunk_size,) if isinstance(self.chunk_size, int) else self.chunk_size
        if any(size < 1 for size in sizes):
            raise MethodError(f"chunk_size={self.chunk_size}: a chunk has 1 sample or more")

    def __call__(self, *inputs: Any) -> Tensor:
        """The loss of one batch, detached, its gradients added to ``.grad``."""
        if not inputs:
            raise ArgumentError("there are no inputs: call cache(queries, passages)")
        encoders = self._one_each(self.encoders, nn.Module, len(inputs), "encoders")
        sizes = self._one_each(self.chunk_size, int, len(inputs), "chunk sizes")
        cut = CutOff(inputs)
        calls = [
            self._calls(encoder, batch, size)
            for encoder, batch, size in zip(encoders, cut.leaves, sizes, strict=True)
        ]
        counts = [len(of_one) for of_one in calls]

        def loss_of(outputs: list[Any]) -> Tensor:
            parts = iter(outputs)
            return self.loss_fn(*(joined([next(parts) for _ in range(n)]) for n in counts))

        loss = backward_by_replay([c for of_one in calls for c in of_one], loss_of, self.scale)
        cut.give_back()
        return loss

    def _one_each(self, given: Any, kind: type[Any], number: int, what: str) -> tuple[Any, ...]:
        if isinstance(given, kind):
            return (given,) * number
        if len(given) != number:
            raise ArgumentError(
                f"expected one input for each of the {len(given)} {what}, found {number}: call "
                "cache(queries, passages); one encoder alone serves any number of inputs"
            )
        return given

    def _calls(self, encoder: nn.Module, batch: Any, size: int) -> list[Call]:
        number = batch_size(batch)
        if number < 1:
            raise BatchError(
                "expected an input whose tensors agree on the length of their first dimension, the samples; "
                "found none, an empty one or different lengths"
            )
        if number > size and has_batch_statistics(encoder):
            raise UnsupportedError(
                "batch norm in training mode takes its statistics over a chunk, not over the batch, and the "
                "gradients would not be the batch's: put these modules into evaluation mode, use another norm, "
                f"or give chunk_size={number}"
            )
        starts = range(0, number, size)
        embed_part = functools.partial(_embed_part, self.embed, encoder, batch, size)
        return [Call(functools.partial(embed_part, start), (encoder,)) for start in starts]


def _embed_part(embed: Embed, encoder: nn.Module, batch: Any, size: int, start: int) -> Any:
    return embed(encoder, narrow(batch, start, start + size))
