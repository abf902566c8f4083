"""Take the cross-entropy of a linear head chunk by chunk over tokens: the logits of a batch never exist.

Formula: for each chunk of C tokens, z = x W^T + b (scaled, soft-capped); loss = logsumexp(z) - z_t (label smoothing
    mixes in logsumexp(z) - mean(z)); dz = softmax(z) - onehot(t); dx = dz W, dW += dz^T x, db += sum(dz). The
    gradients are taken in the forward pass, in place of the logits, and handed over in backward.
Memory: activations: about 3 N V values (logits, their log-softmax, its gradient) become one C x V buffer of temporaries
    during the loss (two with soft-capping or a low-precision head). gradients: dW (V x D) and dx (N x D) exist from the
    loss on, not from the head's backward on; that backward comes first, so the column's peak stays. Low precision
    sums dW in float32 first. Measured, N 1024, D 576, V 49,152, fp32: 576 MiB plain; 158 MiB with C = 256 and 134 with
    C = 128, of which dW is 108. Time: the same three products; what is saved is the page faults of N x V buffers,
    what is added is one pass over dW per chunk. Processor time over plain, one thread, alternating, median of 7
    (AMD EPYC, AVX-512): C = 64: 1.00, 128: 0.82, 256: 0.83, 512: 0.77. Wall time on two cores that others
    used as well: 128: 1.19, 256: 0.96, 512: 0.90. Hence the default of 256.
Exactness: exact up to rounding: sums run in another order; low precision sums over chunks in float32.
Limits: a head that is not a plain nn.Linear, or whose forward another library replaced, is refused; class
    weights, class probabilities and reduction "none" compute the logits as before (no gain); the loss has no
    gradient in the logits; logits read after the optimizer's update, a second backward of a graph that was
    not retained, double backward, and backend "torch" with soft-capping, scale or label smoothing raise an error;
    eager mode only: under torch.compile, tracing and torch.func the head is plain.
References: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009:
    logits are a temporary of the loss. *departs:* chunks over tokens with all classes at once, in torch's own
    products, instead of blocks of both in one kernel; no filtering of small gradients; no second pass for the gradient.
    Hsu et al., Liger Kernel, arXiv 2410.10989 (FusedLinearCrossEntropy): the gradient of each chunk in the
    forward pass. *departs:* the chunk size is a number of tokens, not V / D; the model's forward is not replaced: its
    head returns deferred logits, so that any loss written with cross_entropy is found.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.host import Batch, Host, LossFn
from slimgrad.measuring.fake import faked
from slimgrad.method import Block, Method, Offer, Paper, Refusal, Scope, Undo
from slimgrad.methods.loss.deferring_head import DeferringForward, is_plain_linear
from slimgrad.methods.loss.linear_cross_entropy import (
    DEFAULT_CHUNK_SIZE,
    Backend,
    core_is_present,
)
from slimgrad.types import Column, Exactness

_CHUNK_SIZES = (128, 512)  # measured in planning: a lean one and a fast one
_CORE_CHUNK_SIZE = 512  # torch's own default is many times slower


@dataclass(frozen=True)
class ChunkedCrossEntropy:
    """The loss without logits. ``heads``: dotted paths of the heads; empty: found by ``find_head``."""

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.MODEL
    paper: ClassVar[Paper] = Paper(
        "Cut Your Losses in Large-Vocabulary Language Models",
        "Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun, Philipp Krähenbühl",
        2024,
        arxiv="2411.09009",
    )

    chunk_size: int = DEFAULT_CHUNK_SIZE
    backend: Backend = "slimgrad"
    heads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.chunk_size < 1:
            raise MethodError(f"expected chunk_size of at least 1 token, found {self.chunk_size}")
        if self.backend not in ("slimgrad", "torch"):
            raise MethodError(f"expected backend 'slimgrad' or 'torch', found {self.backend!r}")

    @classmethod
    def settings(cls, host: Host, batch: Any) -> Sequence[Method] | Refusal:
        """Chunk sizes to measure, for the heads whose outputs the user's loss gives to a cross-entropy."""
        with faked(host.model, batch) as (fake_batch,):
            try:
                heads = discover(host.model, host.loss_fn, fake_batch)
            except Exception as error:
                return Refusal(
                    f"no head could be found: the loss does not run on fake tensors ({error!r})"
                )
        if not heads:
            return Refusal("the loss is no cross-entropy of a linear layer's outputs")
        core = [cls(_CORE_CHUNK_SIZE, "torch", heads)] if core_is_present() else []
        return [*(cls(size, heads=heads) for size in _CHUNK_SIZES), *core]

    def offer(self, block: Block) -> Offer | Refusal:
        """The measured step already takes its loss in chunks."""
        if self.backend == "torch" and not core_is_present():
            return Refusal("torch has no linear_cross_entropy before 2.13")
        by = " by torch's linear_cross_entropy" if self.backend == "torch" else ""
        note = f"loss in chunks of {self.chunk_size} tokens{by}, no logits"
        return Offer(block.model_record, note)

    def attach(self, block: Block) -> Undo:
        """Let the model's heads return deferred logits; raises UnsupportedError where no head is found."""
        if self.backend == "torch" and not core_is_present():
            raise MethodError(
                "torch has no linear_cross_entropy before 2.13: use backend 'slimgrad'"
            )
        model = block.live.model
        found = find_head(model)
        paths = self.heads or ((found,) if found is not None else ())
        if not paths:
            raise UnsupportedError(
                "expected a linear head whose outputs are classes, found none in the model: name it with `heads`"
            )
        return attach_heads(model, paths, self.chunk_size, self.backend)


def attach_heads(
    model: nn.Module, paths: tuple[str, ...], chunk_size: int, backend: Backend = "slimgrad"
) -> Undo:
    """Defer the outputs of the linear modules at ``paths``; the Undo restores each exactly.

    Raises UnsupportedError for a module that is no plain ``nn.Linear``; then nothing is changed.
    """
    heads: list[nn.Linear] = []
    for path in paths:
        head = model.get_submodule(path)
        if is_plain_linear(head):
            heads.append(head)
        else:
            raise UnsupportedError(
                f"expected a plain nn.Linear at {path!r}, found {type(head).__name__}"
                + (" with a replaced forward" if "forward" in vars(head) else "")
            )
    undo = Undo()
    for head in heads:
        undo.then(DeferringForward.install(head, chunk_size, backend))
    return undo


def find_head(model: nn.Module) -> str | None:
    """The path of the output head, from the model's structure alone; None if there is none.

    A Hugging Face model's output embeddings if they are a linear layer; else, of the plain ``nn.Linear`` modules with
    more outputs than inputs, the last registered of those with the most outputs. For certainty about a plain
    module use ``discover``.
    """
    linears = {path: m for path, m in model.named_modules() if is_plain_linear(m)}
    get = getattr(model, "get_output_embeddings", None)
    if callable(get):
        try:
            embeddings: Any = get()
        except (NotImplementedError, AttributeError):
            embeddings = None
        for path, module in linears.items():
            if module is embeddings:
                return path
    best, most = None, 0
    for path, module in linears.items():
        num_outputs, num_inputs = module.weight.shape
        if num_outputs > num_inputs and num_outputs >= most:
            best, most = path, num_outputs
    return best


def discover(
    model: nn.Module, loss_fn: LossFn, batch: Batch, chunk_size: int = DEFAULT_CHUNK_SIZE
) -> tuple[str, ...]:
    """The paths of the linear modules whose outputs ``loss_fn`` gives to a cross-entropy, widest first.

    Runs ``loss_fn`` once, in the grad mode and on the (real or fake) tensors it is called with, while every plain
    ``nn.Linear`` defers its output. Parameters, buffers and random states are afterwards as before.
    """
    paths = tuple(path for path, module in model.named_modules() if is_plain_linear(module))
    with _unchanged(model):
        undo = attach_heads(model, paths, chunk_size)
        try:
            loss_fn(model, batch)
            found = [path for path in paths if _was_consumed(model.get_submodule(path))]
        finally:
            undo()
    return tuple(sorted(found, key=lambda path: -_width(model.get_submodule(path))))


def _was_consumed(head: nn.Module) -> bool:
    forward = vars(head)["forward"]
    return any(outcome.consumed for outcome in forward.outcomes)


def _width(head: nn.Module) -> int:
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Buffers and every random state as they were, whatever a forward pass does to them."""
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in kept]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for (module, name, buffer), value in zip(kept, values, strict=True):
            module._buffers[name] = buffer
            if buffer is not None and value is not None:
                _restore(buffer, value)


def _restore(buffer: Tensor, value: Tensor) -> None:
    # compared by value: batch norm writes its statistics without raising the buffer's version
    if not isinstance(buffer, FakeTensor) and not torch.equal(buffer, value):
        with torch.no_grad():
            buffer.copy_(value)
