"""What the methods have in common that keep what a block saves for backward as codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from slimgrad.code import Code, PlacedCode, Use
from slimgrad.method import (
    Block,
    CodedStorage,
    Offer,
    Paper,
    Record,
    Refusal,
    Restore,
    Scope,
    Setting,
    Undo,
    hyperparameters,
    method_name,
)
from slimgrad.types import Column, Exactness, format_bytes

LEAST_BYTES = 16 * 2**10  # what is smaller is not worth a code
# Operations of backward whose result is near where what they read is near: no sign and no place decides.
_SMOOTH = frozenset([
    "mm", "addmm", "bmm", "baddbmm", "mul", "div", "add", "sub", "pow", "convolution_backward",
    "gelu_backward", "silu_backward", "tanh_backward", "sigmoid_backward", "_softmax_backward_data",
    "native_layer_norm_backward", "native_batch_norm_backward", "native_group_norm_backward", "_fused_rms_norm_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
])  # fmt: skip


@dataclass(frozen=True)
class CodedStore(ABC):
    """``storages`` are kept as codes, by their number in the order in which the block's forward makes them.

    ``origins`` says of each which operations made the block's storages till then: a block that runs in another mode
    than the one planned for (dropout switched off, autocast) keeps what these did not make as it is.
    It says what is kept how, and is followed by the schedule that says what is kept at all (``selective_recompute``).
    """

    storages: tuple[int, ...] = ()
    origins: tuple[int, ...] = ()

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness]
    paper: ClassVar[Paper]
    scope: ClassVar[Scope] = Scope.BLOCK
    is_near: ClassVar[bool] = (
        True  # what is decoded is near to the tensor, not only good for its backward
    )

    @abstractmethod
    def suits(self, use: Use) -> bool:
        """Whether a storage that backward uses so may be kept in this code."""

    @abstractmethod
    def code(self) -> Code:
        """The code for one place."""

    @classmethod
    def strengths(cls) -> Sequence[Self]:
        """The settings worth offering."""
        return [cls()]

    @property
    def setting(self) -> Setting:
        """Its name and fields, whatever the block."""
        mine = hyperparameters(self)  # pyright: ignore[reportArgumentType]
        kept = {k: v for k, v in mine.items() if k not in ("storages", "origins")}
        return method_name(type(self)), tuple(kept.items())

    @classmethod
    def grades(cls, block: Block) -> Sequence[Self]:
        """Each setting on the storages of ``block`` that it suits."""
        found = (strength.on(block.measured) for strength in cls.strengths())
        return [method for method in found if method.storages]

    def on(self, record: Record) -> Self:
        """This setting on what it suits of the saved storages that have no code yet."""
        graph, taken = record.graph, {c.number for c in record.coded}
        uses = graph.uses if graph is not None else ()
        suited = tuple(
            number
            for number, use in enumerate(uses)
            if use is not None
            and number not in taken
            and use.is_floating
            and use.num_elements * use.torch_dtype.itemsize >= LEAST_BYTES
            and self.suits(use)
        )
        return replace(self, storages=suited, origins=tuple(uses[s].origin for s in suited))  # pyright: ignore[reportOptionalMemberAccess]

    def only(self, storage: int) -> Self:
        """The same for one of its storages."""
        place = self.storages.index(storage)
        return replace(self, storages=(storage,), origins=self.origins[place : place + 1])

    def offer(self, block: Block) -> Offer | Refusal:
        """The block with the codes in place of ``storages``, and what they were measured to cost."""
        record, graph = block.measured, block.measured.graph
        if graph is None:
            return Refusal("the block's calls differ from one another")
        if record.restore is not Restore.NONE:
            return Refusal("codes come before what says when they are kept")
        if not self.storages:
            return Refusal("backward uses nothing that the block saves in the way this code is for")
        cost = record.coding.get(self.setting)
        if cost is None:
            return Refusal(
                "what it does to the gradient was not measured: measure with sensitivity=True"
            )
        shares = dict(cost.shares)
        sizes, uses, coded = list(graph.num_bytes), list(graph.uses), list[CodedStorage]()
        for number in self.storages:
            use = uses[number]
            if use is None:
                return Refusal(f"storage {number} is not known to be saved")
            sizes[number], uses[number] = self.code().num_bytes(use), None
            elements = use.num_elements
            spent = cost.encode_s * elements, cost.decode_s * elements
            error = cost.squared_error * shares.get(number, 1.0)
            is_smooth = use.readers <= _SMOOTH
            coded.append(
                CodedStorage(
                    number, sizes[number], *spent, error, self.setting, self.is_near, is_smooth
                )
            )
        freed = sum(graph.num_bytes) - sum(sizes)
        changed = replace(
            record,
            graph=replace(graph, num_bytes=tuple(sizes), uses=tuple(uses)),
            coded=(*record.coded, *coded),
            squared_error=record.squared_error + sum(c.squared_error for c in coded),
        )
        return Offer(changed, f"{format_bytes(freed)} less in codes of {len(coded)} tensors")

    def attach(self, block: Block) -> Undo:
        """Name the codes for the schedule that follows."""
        codes, path = block.live.codes, block.path
        before = codes.get(path)
        origins = self.origins or (0,) * len(self.storages)
        placed = zip(self.storages, origins, strict=True)
        codes[path] = (before or {}) | {s: PlacedCode(self.code(), origin) for s, origin in placed}
        if before is None:
            return Undo(lambda: codes.pop(path))
        return Undo(lambda: codes.__setitem__(path, before))
