"""Keep complete gradients outside the device until the update, so that clipping by global norm needs none in memory.

Formula: g_i -> G_i as soon as it is complete, n_i = |g_i|; then c = min(max_norm / (|(n_1, ..., n_k)| + 1e-6), 1), and for
    each parameter in turn: theta_i <- optimizer(theta_i, c * read(G_i)).
Memory: gradients: those being written, and in the update one parameter's, or two slices where the optimizer's state
    is offloaded too. Time: gradients are written during backward and read back in the update.
Exactness: bitwise: the norms and the coefficient are computed as torch.nn.utils.clip_grad_norm_ computes them, in the
    same order of parameters. Without clipping nothing but the place of the gradients changes.
Limits: the optimizer must be separable. Where updates happen during backward there is nothing to keep. Sparse
    gradients stay in memory. Hooks on optimizer.step() see no gradients.
References: Rajbhandari et al., ZeRO-Infinity (arXiv 2104.07857), section 5.1: gradients are offloaded as they are
    made. Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks (arXiv 1211.5063), section
    3.2: the clipping. *departs:* on one device, with the norm taken while each gradient is still in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from slimgrad.host import Host
from slimgrad.method import Block, Offer, Paper, Refusal, Scope, Undo, Update
from slimgrad.storage import Slot, Store, Transfer, dense_view, same_order, store_of
from slimgrad.streaming import Cut, StreamedUpdate
from slimgrad.types import Column, Exactness


def clip_coefficient(norms: list[Tensor], max_norm: float) -> Tensor:
    """The factor of ``torch.nn.utils.clip_grad_norm_`` for gradients of these norms, bit for bit.

    ``norms`` are scalars on the gradients' devices and in their dtypes, in the order of the parameters.
    """
    grouped = _group_tensors_by_device_and_dtype(
        [[*norms]]
    )  # its order is the one in which they are summed
    ordered = [norm for (group, *_), _ in grouped.values() for norm in group if norm is not None]
    total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in ordered]), 2.0)
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


def _norm(gradient: Tensor) -> Tensor:
    return torch._foreach_norm([gradient], 2.0)[0]  # pyright: ignore[reportPrivateImportUsage]


def _scale(gradient: Tensor, coefficient: Tensor | None) -> Tensor:
    if coefficient is not None:
        factor = coefficient.to(gradient.device)
        torch._foreach_mul_([gradient], factor)  # pyright: ignore[reportPrivateImportUsage]
    return gradient


@dataclass
class _Gradient:
    """One parameter's gradient in the store; its slot is kept from step to step."""

    slot: Slot
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    write: Transfer
    norm: Tensor | None


class _Gradients:
    """The complete gradients of a step, and the update that reads them back."""

    def __init__(self, host: Host, store: Store) -> None:
        self._host, self._store = host, store
        self._slots: dict[Tensor, Slot] = {}
        self._written: dict[Tensor, _Gradient] = {}
        self._buffers: list[Tensor] = []
        self._writing: Transfer | None = None

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """Write a complete gradient to the store and free it; a second one of the same step is added to it."""
        gradient = parameter.grad
        if gradient is None or gradient.layout != torch.strided:
            return
        parameter.grad = None
        gradient = gradient.detach()
        if parameter in self._written:
            gradient = self._read(parameter).add_(gradient)
        norm = _norm(gradient) if self._host.clip_grad_norm is not None else None
        flat = dense_view(gradient)
        if flat is None:
            gradient = gradient.contiguous()
            flat = gradient.view(-1)
        slot = self._slot(parameter, flat.numel() * flat.element_size())
        if self._writing is not None:
            self._writing.wait()  # one gradient at a time is held by its writing
        write = self._writing = self._store.start_write(slot, flat)
        shape, stride = gradient.shape, tuple(gradient.stride())
        self._written[parameter] = _Gradient(slot, shape, stride, gradient.dtype, write, norm)

    def _slot(self, parameter: Tensor, num_bytes: int) -> Slot:
        slot = self._slots.get(parameter)
        if slot is None or slot.num_bytes != num_bytes:
            if slot is not None:
                self._store.free(slot)
            slot = self._slots[parameter] = self._store.allocate(num_bytes)
        return slot

    def _read(self, parameter: Tensor) -> Tensor:
        stored = self._written.pop(parameter)
        stored.write.wait()
        gradient = torch.empty_strided(
            stored.shape, stored.stride, dtype=stored.dtype, device=self._store.device
        )
        flat = dense_view(gradient)
        assert flat is not None  # only dense gradients are written
        self._store.read(stored.slot, flat)
        return gradient

    def finish(self) -> None:
        """Clip, update each parameter from its gradient as it is read back, and count one optimizer step."""
        host = self._host
        due = [p for p in host.parameters() if p in self._written or p.grad is not None]
        coefficient = self._coefficient(due)
        streamed = StreamedUpdate.of(host)
        if streamed is not None:
            streamed.expect(due)
        try:
            for parameter in due:
                self._update(parameter, coefficient, streamed)
        finally:
            if streamed is not None:
                streamed.expect(None)
        if host.optimizer is not None:
            host.optimizer.step()

    @torch.no_grad()
    def _coefficient(self, due: list[Tensor]) -> Tensor | None:
        max_norm = self._host.clip_grad_norm
        if max_norm is None or not due:
            return None
        norms: list[Tensor] = []
        for parameter in due:
            stored = self._written.get(parameter)
            norm = stored.norm if stored is not None else None
            if norm is None:
                gradient = parameter.grad if parameter.grad is not None else self._peek(parameter)
                norm = _norm(gradient)
            norms.append(norm)
        return clip_coefficient(norms, float(max_norm))

    def _peek(self, parameter: Tensor) -> Tensor:
        """A gradient that was written before clipping was asked for."""
        stored = self._written[parameter]
        gradient = self._read(parameter)
        self._written[parameter] = stored
        return gradient

    @torch.no_grad()
    def _update(
        self, parameter: Tensor, coefficient: Tensor | None, streamed: StreamedUpdate | None
    ) -> None:
        stored = self._written.get(parameter)
        cuts = streamed.cuts(parameter) if streamed is not None and stored is not None else None
        in_order = stored is not None and same_order(
            parameter.shape, stored.stride, parameter.stride()
        )
        if streamed is not None and cuts is not None and in_order:
            read = self._reader(parameter, cuts, coefficient)
            streamed.update_slices(parameter, read)
            del self._written[parameter]
            return
        if stored is not None:
            parameter.grad = self._read(parameter)
        if parameter.grad is not None:
            _scale(parameter.grad, coefficient)
        self._host.update(parameter)
        parameter.grad = None

    def _reader(self, parameter: Tensor, cuts: list[Cut], coefficient: Tensor | None) -> _Reader:
        stored = self._written[parameter]
        stored.write.wait()
        longest = max(end - start for start, end in cuts) * stored.dtype.itemsize
        if not self._buffers or self._buffers[0].numel() < longest:
            device = self._store.device
            self._buffers.clear()
            self._buffers = [
                torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(2)
            ]
        return _Reader(self._store, stored, cuts, self._buffers, coefficient)

    def release(self) -> None:
        """Put gradients that were not used yet back into their parameters, and give the slots back."""
        for parameter in list(self._written):
            gradient = self._read(parameter)
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        for slot in self._slots.values():
            self._store.free(slot)


class _Reader:
    """``reader(start, end)``: a scaled slice of a gradient, the following slice being read meanwhile."""

    def __init__(
        self,
        store: Store,
        stored: _Gradient,
        cuts: list[Cut],
        buffers: list[Tensor],
        coefficient: Tensor | None,
    ) -> None:
        self._store, self._stored, self._cuts = store, stored, cuts
        self._buffers, self._coefficient = buffers, coefficient
        self._next = self._start(0)

    def _start(self, index: int) -> tuple[Tensor, Transfer] | None:
        if index == len(self._cuts):
            return None
        start, end = self._cuts[index]
        itemsize = self._stored.dtype.itemsize
        part = self._buffers[index % 2][: (end - start) * itemsize].view(self._stored.dtype)
        return part, self._store.start_read(self._stored.slot, part, start * itemsize)

    def __call__(self, start: int, end: int) -> Tensor:
        """The slice ``start``..``end``; slices are asked for in their order, each once."""
        index = self._cuts.index((start, end))
        started = self._next or self._start(index)
        assert started is not None
        part, transfer = started
        transfer.wait()
        self._next = self._start(index + 1)
        return _scale(part, self._coefficient)


@dataclass(frozen=True)
class OffloadGradients:
    """Gradients outside the device from their completion to the update."""

    column: ClassVar[Column] = Column.GRADIENTS
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    scope: ClassVar[Scope] = Scope.MODEL
    paper: ClassVar[Paper] = Paper(
        title="ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning",
        authors="Samyam Rajbhandari, Olatunji Ruwase, Jeff Rasley, Shaden Smith, Yuxiong He",
        year=2021,
        arxiv="2104.07857",
    )

    def offer(self, block: Block) -> Offer | Refusal:
        """The step with its gradients in the store, and the time to write and read them."""
        record = block.model_record
        if record.gradient_bytes == 0:
            return Refusal("nothing in the model has a gradient")
        if not record.separable:
            return Refusal("the optimizer was not shown to update parameters one at a time")
        if record.update is Update.DURING:
            return Refusal("updates during backward leave no gradient to keep")
        if record.gradients_in_files:
            return Refusal("the gradients are already outside the device")
        seconds = record.gradient_bytes / record.read_bytes_s
        seconds += record.gradient_bytes / record.write_bytes_s
        slices = 2 * record.slice_bytes if record.state_in_files else 0
        changed = replace(
            record,
            gradients_in_files=True,
            buffer_bytes=record.buffer_bytes + slices,
            extra_s=record.extra_s + seconds,
        )
        return Offer(changed, "gradients outside the device until the update")

    def attach(self, block: Block) -> Undo:
        """Take over what happens to complete gradients and the end of the step."""
        host = block.live
        gradients = _Gradients(host, store_of(host))
        before = host.on_gradient, host.finish

        def restore() -> None:
            host.on_gradient, host.finish = before

        host.on_gradient, host.finish = gradients.take, gradients.finish
        return Undo(gradients.release, restore)
