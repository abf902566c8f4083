"""Blocks in a row whose forward passes are run again as they are, when backward asks for what they saved.

In the first pass autograd is given a handle, (stage, number), for each tensor that it would save, and nothing is noted
of the operations. When backward asks for one, the modules are run again from the nearest input that is in memory, each
in the random state, under the autocast and with the buffers of its first run; what they save then is what the handles
stand for. Which stages' tensors and which inputs are held meanwhile, a schedule says.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from slimgrad.measuring.randomness import OutsideTorch
from slimgrad.measuring.second_run import SecondRun
from slimgrad.methods.activations.schedules import Holding
from slimgrad.storage.saved import Kept, is_plain, returned_tensors

STAGE_S = 60e-6  # seconds that noting one block takes, and again running it again

_OTHER_PATH = (
    "the forward pass of a block took another path when it was run again for backward: expected {}, found {}; it "
    "depends on something that changes from run to run, so do not have this block run again as a module"
)


class Handle(NamedTuple):
    """What autograd keeps in place of a saved tensor: the ``number``-th that ``stage`` saved."""

    modules: RepeatedModules
    stage: int
    number: int


class _Link(NamedTuple):
    """An argument that the stage before returned, as the ``number``-th of its tensors."""

    number: int
    requires_grad: bool


class _Given(NamedTuple):
    """An argument from elsewhere, which stays in memory."""

    kept: Kept
    requires_grad: bool


@dataclass
class _Stage:
    """One call of a module, ready to be made again. ``saved``: shape and dtype of what a handle stands for."""

    forward: Callable[..., Any]
    leaves: list[Any]
    nest: TreeSpec | None  # None: the leaves are the positional arguments
    parameters: list[Kept]
    random: list[tuple[torch.Generator, bytes]]
    autocast: list[tuple[str, torch.dtype, bool, bool]]
    second_run: SecondRun | None
    saved: list[tuple[torch.Size, torch.dtype] | None] = field(default_factory=list)

    @property
    def is_linked(self) -> bool:
        """Whether it needs what the stage before returned."""
        return any(type(leaf) is _Link for leaf in self.leaves)

    def arguments(self, returned: Sequence[Tensor]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Its arguments, where the stage before ``returned`` these."""
        leaves = [_argument(leaf, returned) for leaf in self.leaves]
        return (leaves, {}) if self.nest is None else tree_unflatten(leaves, self.nest)


def _argument(leaf: Any, returned: Sequence[Tensor]) -> Any:
    if type(leaf) is _Link:
        return returned[leaf.number].detach().requires_grad_(leaf.requires_grad)
    if type(leaf) is _Given:
        return leaf.kept.checked().detach().requires_grad_(leaf.requires_grad)
    return leaf


class RepeatedModules:
    """One pass over blocks in a row; ``holdings`` says what is held when backward is at each of them."""

    def __init__(self, holdings: Sequence[Holding], device: torch.device) -> None:
        self.stages: list[_Stage] = []
        self._holdings = holdings
        self._device = device
        self._devices = _generators(device)
        self._generators = list(self._devices)
        self._returned: list[tuple[weakref.ref[Tensor], int]] = []
        self._outside = OutsideTorch.now()
        self._draws_outside = True
        self._saved: dict[int, list[Tensor | None]] = {}  # by stage, made again and held
        self._inputs: dict[int, tuple[list[Tensor], OutsideTorch | None]] = {}  # of stages, held

    # -- the first run ---------------------------------------------------------------------------------

    def run(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The next stage, for the first time."""
        stage = self._stage(module, forward, args, kwargs)
        saved, index = stage.saved, len(self.stages)

        def pack(tensor: Tensor) -> Handle | Kept:
            if (tensor.is_leaf and tensor.requires_grad) or not is_plain(tensor):
                saved.append(None)
                return Kept.of(tensor)
            saved.append((tensor.shape, tensor.dtype))
            return Handle(self, index, len(saved) - 1)

        with _watched(stage.second_run), saved_tensors_hooks(pack, _unpack):
            result = forward(*args, **kwargs)
        self.stages.append(stage)
        self._returned = [(weakref.ref(x), x._version) for x in returned_tensors(result)]
        return result

    def end(self) -> None:
        """The last stage has run."""
        self._returned = []
        self._draws_outside = not self._outside.same_as(OutsideTorch.now())

    def _stage(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> _Stage:
        if kwargs or not all(isinstance(x, Tensor) for x in args):
            leaves, nest = tree_flatten((args, kwargs))
        else:
            leaves, nest = args, None
        links = {id(x): i for i, (ref, version) in enumerate(self._returned)
                 if (x := ref()) is not None and x._version == version}  # fmt: skip
        own = _own_generators(module)
        self._generators += [g for g in own if g not in self._generators]
        random = [(g, _bytes_of(g.get_state())) for g in (*self._devices, *own)]
        if self.stages and self.stages[-1].random == random:
            random = self.stages[-1].random
        types = dict.fromkeys(("cpu", self._device.type))
        return _Stage(
            forward,
            [_noted(leaf, links) for leaf in leaves],
            nest,
            [Kept.of(parameter) for parameter in module.parameters()],
            random,
            [
                (
                    kind,
                    torch.get_autocast_dtype(kind),
                    torch.is_autocast_enabled(kind),
                    torch.is_autocast_cache_enabled(),
                )
                for kind in types
            ],
            SecondRun(module) if _is_watched(module) else None,
        )

    # -- backward --------------------------------------------------------------------------------------

    def restored(self, stage: int, number: int) -> Tensor:
        """What the first run of ``stage`` saved as the ``number``-th."""
        saved = self._saved.get(stage)
        if saved is None or saved[number] is None:
            if saved is not None:  # asked for a second time: the graph was retained
                self._saved.clear()
                self._inputs.clear()
            self._make(stage)
            saved = self._saved[stage]
        tensor, saved[number] = saved[number], None
        assert tensor is not None
        return tensor

    def _make(self, asked: int) -> None:
        """Run stages again so that what ``asked`` saved is in memory, and what is to be held with it."""
        holding = self._holdings[asked]
        self._saved = {s: saved for s, saved in self._saved.items() if s in holding.stages}
        self._inputs = {s: held for s, held in self._inputs.items() if s in holding.borders}
        wanted = {s for s in holding.stages if s <= asked and s not in self._saved} | {asked}
        borders = {
            b for b in holding.borders if b <= asked and b not in self._inputs
            and b < len(self.stages) and self.stages[b].is_linked
        }  # fmt: skip
        start = self._start(min(wanted | borders))
        returned, outside = self._inputs.get(start, ([], None if start else self._outside))
        with self._replaying(outside):
            for index in range(start, asked + 1):
                if index in borders:
                    now = OutsideTorch.now() if self._draws_outside else None
                    self._inputs[index] = (returned, now)
                returned = self._run_again(index, returned, hold=index in wanted)

    def _start(self, first: int) -> int:
        """The last stage up to ``first`` whose arguments are in memory."""
        while first > 0 and first not in self._inputs and self.stages[first].is_linked:
            first -= 1
        return first

    def _run_again(self, index: int, before: Sequence[Tensor], *, hold: bool) -> list[Tensor]:
        """What a stage returns; what it saves is held, or let go."""
        stage = self.stages[index]
        for parameter in stage.parameters:
            parameter.checked()
        args, kwargs = stage.arguments(before)
        found: list[Tensor | None] = []
        num = 0

        def pack(tensor: Tensor) -> None:
            nonlocal num
            expected = stage.saved[num] if num < len(stage.saved) else None
            num += 1
            if expected is not None and expected != (tensor.shape, tensor.dtype):
                raise RuntimeError(_OTHER_PATH.format(expected, (tensor.shape, tensor.dtype)))
            if hold:
                found.append(None if expected is None else tensor.detach())

        for generator, state in stage.random:
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        with ExitStack() as stack:
            for kind, dtype, enabled, cached in stage.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cached))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(stage.second_run.again() if stage.second_run else nullcontext())
            with saved_tensors_hooks(pack, _never):
                result = stage.forward(*args, **kwargs)
        if num != len(stage.saved):
            texts = (f"{n} saved tensors" for n in (len(stage.saved), num))
            raise RuntimeError(_OTHER_PATH.format(*texts))
        if hold:
            self._saved[index] = found
        return [tensor.detach() for tensor in returned_tensors(result)]

    @contextmanager
    def _replaying(self, outside: OutsideTorch | None) -> Generator[None]:
        """Random states are those of now again afterwards; Python's and NumPy's are ``outside`` before."""
        states = [generator.get_state() for generator in self._generators]
        now = OutsideTorch.now() if self._draws_outside else None
        if now is not None and outside is not None:
            outside.restore()
        try:
            yield
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            if now is not None:
                now.restore()


def _noted(leaf: Any, links: dict[int, int]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    number = links.get(id(leaf))
    if number is not None:
        return _Link(number, leaf.requires_grad)
    return _Given(Kept.of(leaf.detach()), leaf.requires_grad)


def _unpack(packed: Handle | Kept) -> Tensor:
    if isinstance(packed, Kept):
        return packed.checked()
    return packed.modules.restored(packed.stage, packed.number)


def _never(_: Any) -> Tensor:
    raise RuntimeError("the graph of a block's second run is not run backward")


def _is_watched(module: nn.Module) -> bool:
    """Whether there are buffers that a forward pass may change, or hooks inside."""
    return any(
        m._buffers or (m is not module and (m._forward_hooks or m._forward_pre_hooks))
        for m in module.modules()
    )


@contextmanager
def _watched_first(second_run: SecondRun) -> Generator[None]:
    with second_run.first_run(None), second_run.observing():
        yield


def _watched(second_run: SecondRun | None) -> AbstractContextManager[Any]:
    return nullcontext() if second_run is None else _watched_first(second_run)


def _bytes_of(state: Tensor) -> bytes:
    """A generator's state, no tensor: most stages share one."""
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _own_generators(module: nn.Module) -> list[torch.Generator]:
    """The generators that the module, or one inside it, has as attributes."""
    attributes = (value for m in module.modules() for value in vars(m).values())
    return list(dict.fromkeys(a for a in attributes if isinstance(a, torch.Generator)))


def _generators(device: torch.device) -> list[torch.Generator]:
    """The generators that PyTorch's operations draw from."""
    found = [torch.default_generator]
    if device.type == "cuda":
        index = torch.empty(0, device=device).device.index
        found.append(torch.cuda.default_generators[index])
    return found
