"""Keep what a block saves for backward outside the device, and read it back ahead of the block's backward.

Formula: when an operation of the block saves x: S <- write(storage of x); when backward asks for x: x <- read(S).
    As soon as one block's backward begins, what the block before it saved is already being read.
Memory: activations: the block's inputs, and during its backward what it saved (with prefetch: and what the block before
    it saved). Until they are written, at most 16 MiB or one tensor more. Time: each saved byte is written once and
    read once a step, less what overlaps.
Exactness: bitwise: the same bytes come back, with their shape and strides.
Limits: parameters, buffers, the block's own inputs and outputs and storages below min_bytes stay where they are. A
    saved tensor that is modified in place afterwards raises an error where it was not written yet, and otherwise
    backward gets the value that was saved (plain autograd raises). Sparse, quantized and nested tensors and tensor
    subclasses stay in memory. Tensors kept as attributes by an autograd.Function are not seen.
References: Rhu et al., vDNN (arXiv 1602.08124), section III: feature maps are offloaded during the forward pass and
    prefetched one layer ahead during the backward pass. *departs:* what is offloaded are the tensors that autograd
    saves (torch.autograd.graph.saved_tensors_hooks), each storage once, to pinned memory or, on the CPU, to a file.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from slimgrad.errors import MethodError
from slimgrad.host import Host
from slimgrad.method import Block, Offer, Paper, Refusal, Restore, Scope, Undo
from slimgrad.methods.activations.wrapping import wrap_forward
from slimgrad.storage import Store, store_of
from slimgrad.storage.saved import MODIFIED, Geometry, Kept, is_plain, returned_tensors
from slimgrad.storage.stored import HAND_OVER_S, SMALL_BYTES, Stored, whole_storage
from slimgrad.types import Column, Exactness, format_bytes


class _Saved:
    """One storage that a block saved, kept or in the store, as long as anything in the graph needs it."""

    def __init__(self, store: Store, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.num_bytes = storage.nbytes()
        self.version = tensor._version
        self.source = StorageWeakRef(storage)  # while it is held, no other storage has its identity
        self._store = store
        self._kept: Tensor | None = whole_storage(tensor)
        self._stored: Stored | None = None
        self._restored: StorageWeakRef | None = None
        self._held: torch.UntypedStorage | None = None
        self.num_asks = 0  # tensors that autograd keeps of it and has not asked for yet

    def write(self) -> None:
        """Start writing; the storage is let go when it is written."""
        if self._kept is not None and self._kept._version == self.version:
            self._stored = Stored(self._store, self._kept)
            self._kept = None

    def settle(self) -> None:
        """Wait for the write; its error is for who asks for the bytes."""
        if self._stored is not None:
            self._stored.settle()

    def keep(self, tensor: Tensor) -> None:
        """Hold on to the storage, which ``tensor`` shows, after all: the block returned it."""
        if self._kept is None and tensor._version == self.version:
            self._kept = tensor.detach()

    def read_ahead(self) -> None:
        """Start reading, unless the bytes are in memory already."""
        if self._stored is not None and self._live() is None:
            self._stored.read_ahead()

    def restore(self) -> torch.UntypedStorage:
        """The bytes in memory, held until all that autograd keeps of them has been asked for."""
        self.num_asks -= 1
        storage = self._restore()
        self._held = storage if self.num_asks > 0 else None
        return storage

    def _restore(self) -> torch.UntypedStorage:
        live = self._live()
        if live is not None:
            return live
        if self._stored is None:
            raise RuntimeError(MODIFIED.format(f"{self.num_bytes} bytes"))
        storage = self._stored.read()
        self._restored = StorageWeakRef(storage)
        return storage

    def _live(self) -> torch.UntypedStorage | None:
        if self._kept is not None:
            return self._kept.untyped_storage() if self._kept._version == self.version else None
        if self._restored is None:
            return None
        return torch.UntypedStorage._new_with_weak_ptr(self._restored.cdata)


class _Call:
    """One call of a block: what it saved, and the call before it. Held by what autograd keeps of it."""

    def __init__(self, before: weakref.ref[_Call] | None) -> None:
        self.before = before
        self.saved: list[weakref.ref[_Saved]] = []
        self._newest: _Saved | None = None
        self._has_begun = False

    def settle(self) -> None:
        """Wait until what the call saved is written, and let go."""
        for reference in self.saved:
            if (saved := reference()) is not None:
                saved.settle()

    def add(self, saved: _Saved) -> None:
        """One more storage saved. It is written when the next one comes: the last is often what is returned."""
        if saved is self._newest:
            return
        self.saved.append(weakref.ref(saved))
        if self._newest is not None:
            self._newest.write()
        self._newest = saved

    def end(self, outputs: Mapping[int, Tensor]) -> None:
        """The forward pass is over: what it returned (by identity of storage) stays, the rest is written."""
        for reference in self.saved:
            if (saved := reference()) is not None:
                if (output := outputs.get(saved.source.cdata)) is not None:
                    saved.keep(output)
                else:
                    saved.write()
        self._newest = None

    def begin_backward(self, prefetch: int) -> None:
        """When the first tensor of this call is asked for: read its others, and those of the calls before it."""
        if self._has_begun or prefetch == 0:
            return
        self._has_begun = True
        call: _Call | None = self
        for _ in range(prefetch + 1):
            for reference in reversed(call.saved if call is not None else []):
                if (saved := reference()) is not None:
                    saved.read_ahead()
            call = call.before() if call is not None and call.before is not None else None


@dataclass(frozen=True)
class _Packed:
    """What autograd keeps in place of a tensor whose storage was written."""

    saved: _Saved
    call: _Call
    geometry: Geometry


class _Tape:
    """The calls of a host's offloaded blocks, in their order, and the storages they saved, each once."""

    def __init__(self, host: Host) -> None:
        self.store = store_of(host)
        self._model = host.model
        self._last: weakref.ref[_Call] | None = None
        self._saved: weakref.WeakValueDictionary[int, _Saved] = weakref.WeakValueDictionary()
        self.weights: frozenset[int] = frozenset()  # addresses of the model's own storages

    def begin(self) -> _Call:
        """A new call; the first one of a step looks up where the model's own storages are."""
        before = self._last if self._last is not None and self._last() is not None else None
        if before is None:
            tensors = (*self._model.parameters(), *self._model.buffers())
            self.weights = frozenset(map(_address, tensors))
        return _Call(before)

    def end(self, call: _Call, result: Any) -> None:
        """The call's forward pass is over; one that saved nothing leaves no trace."""
        call.end({leaf.untyped_storage()._cdata: leaf for leaf in returned_tensors(result)})
        before = call.before() if call.before is not None else None
        if before is not None and self.store.device.type == "cpu":
            before.settle()  # no more than one block's writes are ever under way
        if call.saved:
            self._last = weakref.ref(call)

    def saved(self, tensor: Tensor) -> _Saved:
        """The storage of ``tensor`` as it is now, known already or new."""
        identity = tensor.untyped_storage()._cdata
        known = self._saved.get(identity)
        if known is None or known.version != tensor._version:
            known = self._saved[identity] = _Saved(self.store, tensor)
        return known


_tapes: weakref.WeakKeyDictionary[Host, weakref.ref[_Tape]] = weakref.WeakKeyDictionary()


def _tape_of(host: Host) -> _Tape:
    reference = _tapes.get(host)
    tape = reference() if reference is not None else None
    if tape is None:
        tape = _Tape(host)
        _tapes[host] = weakref.ref(tape)
    return tape


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else 0


def _unpack(prefetch: int, packed: _Packed | Kept) -> Tensor:
    if isinstance(packed, Kept):
        return packed.checked()
    packed.call.begin_backward(prefetch)
    return packed.geometry.on(packed.saved.restore())


@dataclass(frozen=True)
class OffloadActivations:
    """A block's saved tensors outside the device between its forward and backward pass.

    Storages below ``min_bytes`` stay. When a block's backward begins, what the ``prefetch`` blocks before it saved
    is read ahead; 0 reads each tensor when it is asked for.
    """

    min_bytes: int = SMALL_BYTES
    prefetch: int = 1

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    scope: ClassVar[Scope] = Scope.BLOCK
    paper: ClassVar[Paper] = Paper(
        title="vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural Network Design",
        authors="Minsoo Rhu, Natalia Gimelshein, Jason Clemons, Arslan Zulfiqar, Stephen W. Keckler",
        year=2016,
        arxiv="1602.08124",
    )

    def __post_init__(self) -> None:
        if self.min_bytes < 1:
            raise MethodError(f"min_bytes must be at least 1, found {self.min_bytes}")
        if self.prefetch < 0:
            raise MethodError(f"prefetch must be at least 0, found {self.prefetch}")

    def offer(self, block: Block) -> Offer | Refusal:
        """The block with nothing held between forward and backward, and the time to write and read it."""
        record = block.measured
        if record.restore is not Restore.NONE or record.held_bytes == 0:
            return Refusal("nothing of this block is held until its backward")
        if record.saved_bytes < self.min_bytes:
            return Refusal(
                f"the block saves {format_bytes(record.saved_bytes)}, less than min_bytes "
                f"({format_bytes(self.min_bytes)})"
            )
        kept = sum(size for size in record.saved_sizes if size < self.min_bytes)
        moved = record.held_bytes - kept
        handing_s = HAND_OVER_S * sum(size >= self.min_bytes for size in record.saved_sizes)
        changed = replace(
            record,
            held_bytes=kept,
            restore=Restore.COPY,
            store_s=record.store_s + moved / record.write_bytes_s + handing_s,
            restore_s=record.restore_s + moved / record.read_bytes_s + handing_s,
        )
        return Offer(changed, "saved activations outside the device")

    def attach(self, block: Block) -> Undo:
        """Run the block's forward under hooks on what it saves."""
        host = block.live
        tape = _tape_of(host)
        return wrap_forward(
            host.model.get_submodule(block.path), functools.partial(self._run, tape)
        )

    def _run(
        self, tape: _Tape, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = tape.begin()
        leaves: list[Any] = tree_leaves((args, kwargs))
        inputs = {_address(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        pack = functools.partial(self._pack, tape, call, inputs)
        with saved_tensors_hooks(pack, functools.partial(_unpack, self.prefetch)):
            result = run(*args, **kwargs)
        tape.end(call, result)
        return result

    def _pack(self, tape: _Tape, call: _Call, inputs: set[int], tensor: Tensor) -> _Packed | Kept:
        stays = (
            not is_plain(tensor)
            or tensor.device.type != tape.store.device.type
            or tensor.untyped_storage().nbytes() < self.min_bytes
            or tensor.untyped_storage().nbytes() % tensor.element_size() != 0
            or _address(tensor) in inputs
            or _address(tensor) in tape.weights
        )
        if stays:
            return Kept.of(tensor)
        saved = tape.saved(tensor)
        saved.num_asks += 1
        call.add(saved)
        return _Packed(saved, call, Geometry.of(tensor))
