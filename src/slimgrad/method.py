"""The contract of a method on one page: Method, Paper, Block, Record, Offer, Refusal, Undo.

A method is a frozen dataclass, constructible without arguments, whose fields are its hyperparameters with the
paper's defaults. It declares ``column``, ``exactness``, ``scope`` and ``paper``, and has two verbs:

- ``offer(block)`` answers what the method would do for a block: an ``Offer`` with the block's new record, or a
  ``Refusal`` with a reason. It needs numbers only, so a plan can be made from a saved profile.
- ``attach(block)`` changes the live block and returns the ``Undo`` that puts everything back.

Offers do not add up (few-bit stores under recomputation save nothing), so an offer is never a number of bytes
saved: it maps a measured record to a new one, and the next method is asked about the new record.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Protocol,
    TypeAlias,
    TypeVar,
    runtime_checkable,
)

from slimgrad.operation_graph import OperationGraph
from slimgrad.types import Column, Exactness

if TYPE_CHECKING:
    from slimgrad.host import Host

Setting: TypeAlias = tuple[str, tuple[tuple[str, Any], ...]]
"""A method's name and its fields."""

_Thing = TypeVar("_Thing", bound=Callable[..., Any])


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. ``arxiv`` is the identifier alone (``"1604.06174"``), or None."""

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    url: str | None = None

    @property
    def link(self) -> str:
        """An address a reader can open, or an empty string."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else (self.url or "")


class Scope(enum.StrEnum):
    """What a method is offered: a block (a call of a module), blocks in a row, or the whole model and its step."""

    BLOCK = "block"
    RUN = "run"
    MODEL = "model"


class Restore(enum.StrEnum):
    """How what a block's backward needs comes back, right before that backward runs."""

    NONE = "none"  # it never left
    REPLAY = "replay"  # the forward pass of the block is run again
    COPY = "copy"  # it is copied back from the host's memory or from files
    OPERATIONS = "operations"  # the operations that make it are run again, when it is asked for


@dataclass(frozen=True)
class CompiledCost:
    """What one call of a block takes once it is compiled, measured on the real block. Bytes and seconds.

    The peaks are above what is live when the block's forward, and its backward, begin. ``plain_*`` are the same
    call's figures as it is; the seconds of both were taken in turns. ``num_sharing`` blocks share the code that
    ``compile_s`` seconds made.
    """

    saved_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    forward_s: float
    backward_s: float
    plain_saved_bytes: int
    plain_forward_s: float
    plain_backward_s: float
    compile_s: float
    num_sharing: int
    holds_inputs: bool
    holds_outputs: bool


@dataclass(frozen=True)
class CodedStorage:
    """A saved storage, by its number, that is kept as a code of ``num_bytes``, and what that costs.

    ``squared_error`` is what the code, of this ``setting``, does to the whole step's gradient: the square of the relative
    L2 error. Where it ``is_near``, what is decoded is near to the tensor, and operations may be run again on it. Where it
    ``is_smooth``, so is what backward makes of the storage: it may be made again from what is near.
    """

    number: int
    num_bytes: int
    encode_s: float
    decode_s: float
    squared_error: float
    setting: Setting
    is_near: bool = True
    is_smooth: bool = True


@dataclass(frozen=True)
class CodingCost:
    """What one setting of a method that keeps codes was measured to cost on a block.

    Seconds for an element, and by how much the whole step's gradient changes: the square of the relative L2 error, and
    the share of each of the block's storages in it, by their number. ``own_error`` and ``own_cosine`` are of the
    gradient of the block's own parameters alone: its relative L2 error, and its cosine with the exact one.
    """

    encode_s: float
    decode_s: float
    squared_error: float
    shares: tuple[tuple[int, float], ...] = ()
    own_error: float = 0.0
    own_cosine: float = 1.0


@dataclass(frozen=True)
class Record:
    """One block as measured, or as a method would make it. Bytes and seconds.

    ``saved_bytes`` is what the block's own backward needs, its inputs apart; ``held_bytes`` is how much of that
    stays on the device between forward and backward; ``holds_inputs`` tells whether the block's inputs must
    also stay until its backward (recomputation starts from them).
    """

    saved_bytes: int
    held_bytes: int
    input_bytes: int
    output_bytes: int
    forward_s: float
    backward_s: float
    restore: Restore = Restore.NONE
    restore_s: float = 0.0
    store_s: float = 0.0
    holds_inputs: bool = False
    saved_sizes: tuple[int, ...] = ()  # bytes of each saved tensor's storage
    graph: OperationGraph | None = None  # None: its calls differ from one another
    kept: tuple[int, ...] = ()  # storages that stay, by number, where operations are run again
    moved: tuple[int, ...] = ()  # and those that are copied out of memory and back
    coded: tuple[CodedStorage, ...] = ()  # and those that are kept as codes
    squared_error: float = 0.0  # of the whole gradient, relative, that codes on this block bring
    coding: Mapping[Setting, CodingCost] = field(default_factory=dict)  # as measured on this block
    schedule: tuple[int, ...] = ()  # and, over several blocks in a row, what is held meanwhile
    are_repeatable: bool = False  # whether blocks in a row can be run again as modules,
    by_modules: bool = False  # and whether they are
    held_anyway: tuple[int, ...] = ()  # storages that the rest of the step keeps alive, by number
    compiled: CompiledCost | None = None  # None: not measured
    is_compiled: bool = False
    num_steps: int = 1000  # over which what is done once is paid off
    once_s: float = 0.0  # its share of what is done once, not every step
    gradients_stay: bool = True  # until backward is over: no update or file takes them before
    has_batch_statistics: bool = False
    read_bytes_s: float = 1e9
    write_bytes_s: float = 1e9

    @property
    def seconds(self) -> float:
        """One step's time in this block, with a step's part of what is done once."""
        passes = self.forward_s + self.store_s + self.restore_s + self.backward_s
        return passes + self.once_s / self.num_steps


class Update(enum.StrEnum):
    """When a parameter is updated."""

    AFTER = "after"  # optimizer.step() once backward is over
    DURING = "during"  # as soon as its gradient is complete


@dataclass(frozen=True)
class ModelRecord:
    """What a whole step looks like to the methods of scope ``model``. Bytes and seconds.

    Methods that rewrite the step itself (``Rewriting``) were attached while it was traced, so the record is of
    the step with them; the other fields say what happens to gradients and optimizer state.
    """

    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    state_tensors: (
        int  # tensors of a parameter's own shape that the optimizer keeps for it (AdamW: 2)
    )
    largest_parameter_bytes: int
    update_s: float
    batch_size: int
    separable: bool  # the optimizer was shown by value to treat parameters one by one
    elementwise: bool  # ... and to treat parts of a parameter one by one
    has_batch_statistics: bool = False
    has_dropout: bool = False
    clip_grad_norm: float | None = None
    read_bytes_s: float = 1e9
    write_bytes_s: float = 1e9
    micro_batches: int = 1
    update: Update = Update.AFTER
    state_in_files: bool = False
    gradients_in_files: bool = False
    buffer_bytes: int = 0  # preallocated staging buffers
    slice_bytes: int = 0  # an update's largest part of one parameter; 0: the whole parameter
    extra_s: float = 0.0
    compile_s: float = 0.0  # what compiling the whole step took, once
    num_steps: int = 1000  # over which what is done once is paid off


@dataclass(frozen=True)
class Offer:
    """What a method would make of a block: its new record, and one sentence for the table."""

    record: Record | ModelRecord
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a method cannot, or should not, be used on a block."""

    reason: str


@dataclass(frozen=True)
class Block:
    """What a method is asked about, and what it is attached to.

    ``path`` is the dotted name of the module (empty for the whole model), or of the first of the modules ``paths``
    in a row. ``record`` is there when a plan is made; ``host`` when it is applied.
    """

    path: str
    scope: Scope
    record: Record | ModelRecord | None = None
    host: Host | None = field(default=None, compare=False)
    paths: tuple[str, ...] = ()

    @property
    def measured(self) -> Record:
        """The record of a block of scope ``block``."""
        if not isinstance(self.record, Record):
            raise TypeError(f"block {self.path!r} has no record of a block")
        return self.record

    @property
    def model_record(self) -> ModelRecord:
        """The record of the whole model."""
        if not isinstance(self.record, ModelRecord):
            raise TypeError(f"block {self.path!r} has no record of a model")
        return self.record

    @property
    def live(self) -> Host:
        """The user's objects; raises TypeError while only a plan is being made."""
        if self.host is None:
            raise TypeError(
                f"block {self.path!r} is not live: a method can be attached only by apply"
            )
        return self.host


class Undo:
    """Puts back what a method changed. Calling it twice does nothing the second time.

    Several are combined with ``Undo.all``, which runs them last first.
    """

    def __init__(self, *actions: Callable[[], object]) -> None:
        self._actions = list(actions)

    def __call__(self) -> None:
        """Put everything back, what was changed last first."""
        while self._actions:
            self._actions.pop()()

    def then(self, action: Callable[[], object]) -> None:
        """Add ``action``, to be run before those already here."""
        self._actions.append(action)

    @staticmethod
    def all(undos: list[Undo]) -> Undo:
        """One undo for several, run last first."""
        return Undo(*undos)


@runtime_checkable
class Method(Protocol):
    """The two verbs and the four declarations of every method."""

    column: ClassVar[Column]
    exactness: ClassVar[Exactness]
    scope: ClassVar[Scope]
    paper: ClassVar[Paper]

    def offer(self, block: Block) -> Offer | Refusal:
        """What this method would make of ``block``, or why not."""
        ...

    def attach(self, block: Block) -> Undo:
        """Change the live ``block``; the returned Undo puts everything back."""
        ...


@runtime_checkable
class Graded(Protocol):
    """A method of scope ``block`` or ``run`` with more than one setting worth offering."""

    @classmethod
    def grades(cls, block: Block) -> Sequence[Method]:
        """The settings to offer for ``block``, from its record alone."""
        ...


@runtime_checkable
class Rewriting(Protocol):
    """A method of scope ``model`` that changes the step itself, so that it must be traced while attached.

    ``measure`` asks for its ``settings`` on the live model and traces the step once with each, on fake tensors. One
    that compiles (``compiles = True``) is traced, and timed, on real steps, alone. One that only changes how long
    tensors live (``is_refinement = True``) is left out where that frees next to nothing, and combined with none of the
    others: a trace for each would cost more than it is ever worth.
    """

    @classmethod
    def settings(cls, host: Host, batch: Any) -> Sequence[Method] | Refusal:
        """The settings worth measuring on this model and batch, or why there is none."""
        ...


@dataclass(frozen=True)
class Component:
    """What a layer or a function declares that users put into their own models and loops; no plan chooses it."""

    column: Column
    exactness: Exactness
    paper: Paper


def component(column: Column, exactness: Exactness, paper: Paper) -> Callable[[_Thing], _Thing]:
    """Declare the class or function that a module is about; the module's docstring is its card."""

    def declare(thing: _Thing) -> _Thing:
        setattr(thing, "component", Component(column, exactness, paper))  # noqa: B010
        return thing

    return declare


def method_name(method: Method | Callable[..., Any]) -> str:
    """A method's name everywhere: the name of the module that defines it."""
    defined = method if hasattr(method, "__qualname__") else type(method)
    return defined.__module__.rpartition(".")[2]


def hyperparameters(method: Method) -> Mapping[str, Any]:
    """A method's fields and their values."""
    return {f.name: getattr(method, f.name) for f in fields(method)}  # pyright: ignore[reportArgumentType]
