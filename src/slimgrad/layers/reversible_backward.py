"""The node of the autograd graph that a reversible block is, and what one pass hands from node to node."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from slimgrad.errors import SlimgradError, UnsupportedError
from slimgrad.layers.coupling import Arithmetic, BlockCall, Piece, ReversibleBlock
from slimgrad.layers.recomputed_ahead import Ahead

_Grads = dict[int, Tensor]


@dataclass
class Extras:
    """The arguments that go to every function of a chain: tensors apart from the rest."""

    leaves: list[Any]
    nest: TreeSpec
    tensors: list[Tensor]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Extras:
        """Flatten them; a tensor's place is kept by None."""
        leaves, nest = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return Extras([_TENSOR if isinstance(x, Tensor) else x for x in leaves], nest, tensors)

    def with_tensors(self, tensors: Iterable[Tensor]) -> tuple[Any, Any]:
        """Positional and keyword arguments with ``tensors`` in the places of the tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.nest)

    def plain(self) -> tuple[Any, Any]:
        """The arguments themselves."""
        return self.with_tensors(self.tensors)


_TENSOR = object()


@dataclass
class Carried:
    """What one node leaves for the next: the streams between them, and what was run ahead."""

    held: list[Tensor]
    ahead: Ahead
    position: int = -1  # the block whose outputs are held in backward; -1: none


@dataclass(eq=False)
class Link:
    """A block's place in a pass."""

    index: int
    block: ReversibleBlock
    arithmetic: Arithmetic
    dtypes: list[torch.dtype]
    carried: Carried
    extras: Extras
    is_last: bool
    before: Link | None = None
    call: BlockCall | None = None


def differentiate(
    link: Link, streams: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run the block as one node of the graph. ``link.carried.held`` are its inputs, and then its outputs."""
    carried = link.carried
    tensors = link.extras.tensors
    out = _Node.apply(link, len(streams), len(tensors), *streams, *tensors, *parameters)
    made: tuple[Tensor, ...] = tuple(out)  # pyright: ignore[reportArgumentType]
    if any(x.requires_grad for x in made):  # no other block is gone back through
        carried.ahead.passed(link)
    return made


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, num_streams: int, num_extras: int, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        extras = list(tensors[num_streams : num_streams + num_extras])
        carried, block = link.carried, link.block
        link.call, carried.held = BlockCall.run(
            block, link.arithmetic, carried.held, link.dtypes, link.extras.with_tensors(extras)
        )
        dtypes = block.rotated(link.dtypes)
        streams = tuple(
            link.arithmetic.leave(h, d) for h, d in zip(carried.held, dtypes, strict=True)
        )
        ctx.link, ctx.num_streams, ctx.num_extras = link, num_streams, num_extras
        ctx.parameters = tensors[num_streams + num_extras :]
        ctx.num_kept = len(carried.held) if link.is_last else 0
        kept = _kept(carried.held, streams) if link.is_last else ()
        ctx.save_for_backward(*kept, *extras)
        return streams

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a reversible chain is differentiated once (create_graph=True was asked for): its graph is "
                "made anew in backward; set is_reversible = False for double backward"
            )
        link: Link = ctx.link
        carried, saved = link.carried, ctx.saved_tensors
        if link.is_last:
            carried.held, carried.position = list(saved[: ctx.num_kept]), link.index
            carried.ahead.clear()
        if carried.position != link.index:
            raise SlimgradError(
                f"the streams after block {link.index} are not there: a backward pass of this chain failed or "
                "was run before; run the forward pass again"
            )
        carried.position = -1  # whatever fails below leaves nothing to go on from
        try:
            return _backward(ctx, link, list(gradients), list(saved[ctx.num_kept :]))
        except BaseException:
            carried.held = []
            carried.ahead.clear()
            raise


def _kept(held: list[Tensor], streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the last block keeps: its outputs, or the integers that they come from."""
    return streams if held[0].dtype == streams[0].dtype else tuple(held)


def _backward(
    ctx: Any, link: Link, gradients: list[Tensor], extras: list[Tensor]
) -> tuple[Any, ...]:
    carried, block, n = link.carried, link.block, ctx.num_streams
    needed = ctx.needs_input_grad[3:]
    needs_extras = needed[n : n + ctx.num_extras]
    found: _Grads = {}
    given = block.unrotated(gradients)
    del gradients
    job = _Job(link, carried.held, extras, needs_extras, ctx.parameters)
    carried.held = []
    taken = carried.ahead.taken(job)
    for piece in taken.pieces:
        _differentiate_piece(piece, taken.job, given, found)
        del piece
    carried.held, carried.position = taken.job.held, link.index - 1
    if not any(needed[:n]):
        carried.held, carried.position = [], -1
    streams = [g if need else None for g, need in zip(given, needed[:n], strict=True)]
    sides = [found.get(id(x)) for x in taken.job.extras]
    weights = [found.get(id(p)) for p in ctx.parameters]
    return (None, None, None, *streams, *sides, *weights)


class _Job:
    """The reconstruction of one block: from the streams after it, as they are held, to those before it."""

    def __init__(
        self,
        link: Link,
        held: list[Tensor],
        extras: Sequence[Tensor],
        needs_extras: Sequence[bool],
        parameters: Sequence[Tensor],
    ) -> None:
        self.link = link
        self.held = link.block.unrotated(held)
        self.extras = [
            x.detach().requires_grad_(need) for x, need in zip(extras, needs_extras, strict=True)
        ]
        self.parameters = list(parameters)

    def pieces(self) -> Generator[Piece]:
        """Functions called again, last first; ``held`` are the block's inputs when all have been."""
        assert self.link.call is not None
        extras = self.link.extras.with_tensors(self.extras)
        return self.link.call.reconstruct(self.held, extras, graph=True)

    def before(self) -> _Job | None:
        """The job of the block before, where this one is done; None if there is none that needs a gradient."""
        link = self.link.before
        if link is None:
            return None
        parameters = [p for p in link.block.parameters() if p.requires_grad]
        needs = [x.requires_grad for x in self.extras]
        return _Job(link, self.held, [x.detach() for x in self.extras], needs, parameters)


def _differentiate_piece(piece: Piece, job: _Job, gradients: list[Tensor], found: _Grads) -> None:
    """Add to ``gradients`` of the streams, and to ``found`` by the tensor's id, what goes through one function."""
    k, block = piece.k, job.link.block
    gradient, scale = gradients[k], block.scales[k]
    gradients[k] = gradient if scale == 1 else gradient * scale
    if piece.change is None or piece.given is None or not piece.change.requires_grad:
        return
    own = [p for p in block.functions[k].parameters() if p.requires_grad]
    inputs = [piece.given, *(x for x in job.extras if x.requires_grad), *own]
    _check_leaves(piece.change, inputs, block, k)
    with _no_hooks(own):
        made: Sequence[Tensor | None] = torch.autograd.grad(
            piece.change, inputs, gradient.to(piece.change.dtype), allow_unused=True
        )
    if made[0] is not None:  # pyright: ignore[reportUnnecessaryComparison]
        share = made[0] if block.num_streams == 2 else made[0] / (block.num_streams - 1)
        for j in range(block.num_streams):
            if j != k:
                gradients[j] = gradients[j] + share
    for tensor, value in zip(inputs[1:], made[1:], strict=True):
        if value is not None:  # pyright: ignore[reportUnnecessaryComparison]
            before = found.get(id(tensor))
            found[id(tensor)] = value if before is None else before + value


def _check_leaves(change: Tensor, inputs: list[Tensor], block: ReversibleBlock, k: int) -> None:
    """Once for each function: everything that it learns must be known here, or its gradient would be lost."""
    if k in block.checked:
        return
    known = {id(x) for x in inputs}
    stack, met = [change.grad_fn], set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        met.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise UnsupportedError(
                f"{type(block.functions[k]).__name__} uses a tensor of shape {tuple(leaf.shape)} that needs a "
                "gradient and is neither its parameter nor an argument of the chain: register or pass it"
            )
        stack += [n for n, _ in node.next_functions]
    block.checked.add(k)


@contextmanager
def _no_hooks(parameters: Sequence[Tensor]) -> Generator[None]:
    """Hooks of parameters are for their whole gradients, and run where those are complete: outside."""
    kept = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in kept:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in kept:
            parameter._backward_hooks = hooks
